"""Adam in one pass and clipping in place train what Megatron's own do, also after loading."""

import torch

from tests.closeness import rounding
from tests.training_runs import run_pretrain, tiny_gpt
from ultramem_megatron.patches.registry import PATCH_MODULES

_NAME = "cpu.fused_adam"
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
