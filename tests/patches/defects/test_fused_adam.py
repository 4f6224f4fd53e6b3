"""Adam in one pass and clipping in place train what Megatron's own do, also after loading."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.closeness import rounding
from tests.training_runs import run_pretrain, tiny_gpt
from ultramem_megatron.patches.defects.fused_adam import ask_for_one_pass
from ultramem_megatron.patches.registry import PATCH_MODULES

_NAME = "defects.fused_adam"
_WITHOUT = [name for name in PATCH_MODULES if name != _NAME]
_FLAGS = {"clip_grad": 0.1, "weight_decay": 0.1, "ckpt_format": "torch_dist"}


def _fused(trained):
    return [group["fused"] for group in trained.optimizer.param_groups]


def _run(patches=None, **flags):
    argv = tiny_gpt(ultramem_spans="1:2", ultramem_num_keys=12, ultramem_topk=6, **_FLAGS, **flags)
    return run_pretrain(1, argv, parameters=True, on_finish=_fused, patches=patches)


def test_it_trains_what_separate_passes_train(tmp_path):
    saved = {"save": tmp_path, "save_interval": 2, "exit_interval": 2}
    _run(patches=_WITHOUT, **saved, train_iters=4)
    loaded = {"load": tmp_path, "train_iters": 4}
    one, other = _run(**loaded), _run(patches=_WITHOUT, **loaded)
    assert set(one.ranks[0].finished) == {True}
    assert set(other.ranks[0].finished) == {None}
    assert len(one.losses) == 2
    assert min(one.grad_norms) > 0.1, "clipping takes no part"
    for name, expected in other.ranks[0].parameters.items():
        tolerance = 64 * rounding(torch.float32, 1)
        torch.testing.assert_close(
            one.ranks[0].parameters[name], expected, rtol=tolerance, atol=tolerance, msg=name
        )


def _optimizer_on(device):
    """torch's AdamW as Megatron builds it, with the hook, before its first step."""
    parameter = torch.nn.Parameter(torch.ones(4, device=device))
    optimizer = torch.optim.AdamW([parameter])
    optimizer.register_step_pre_hook(ask_for_one_pass)
    parameter.grad = torch.ones_like(parameter)
    return parameter, optimizer


def _count(optimizer):
    (state,) = optimizer.state.values()
    return state["step"]


@pytest.mark.parametrize("saved", [None, True], ids=["saved unfused", "saved fused"])
def test_steps_are_counted_where_the_parameter_is(saved):
    """On a GPU that nobody has: tensors with all but numbers. The kernel reads the count there."""
    with FakeTensorMode():
        parameter, optimizer = _optimizer_on("cuda")
        optimizer.step()
        assert optimizer.param_groups[0]["fused"] is True
        assert _count(optimizer).device == parameter.device
        loaded = optimizer.state_dict()
        loaded["param_groups"][0]["fused"] = saved
        loaded["state"][0]["step"] = torch.tensor(7.0)  # as checkpoints have it
        optimizer.load_state_dict(loaded)
        assert _count(optimizer).device.type == ("cuda" if saved else "cpu")
        optimizer.step()
        assert _count(optimizer).device == parameter.device


@pytest.mark.parametrize(
    "made", [lambda: torch.zeros(2, device="meta"), lambda: torch.zeros(2, dtype=torch.int64)]
)
def test_what_no_kernel_takes_is_left_to_torch(made):
    optimizer = torch.optim.AdamW([torch.nn.Parameter(made(), requires_grad=False)])
    ask_for_one_pass(optimizer)
    assert optimizer.param_groups[0]["fused"] is False
