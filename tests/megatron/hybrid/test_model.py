"""A HybridModel with memories on one rank: the GPT that it is, recomputed, resumed."""

import functools
import re
import zlib

import pytest
import torch

from tests.training_runs import run_pretrain, tiny_gpt
from tests.whole_model import AFTER_STEPS, STEADY, assert_same_training, train

_MEMORY = {
    "ultramem_num_keys": 12,
    "ultramem_topk": 6,
    "ultramem_query_conv_kernel": 3,
    "ultramem_aux_loss_weight": 1.0,
    "ckpt_format": "torch_dist",
    "disable_bias_linear": True,
    **STEADY,
}
_MAMBA = {"mamba_state_dim": 8, "mamba_head_dim": 8, "mamba_num_groups": 2}
_EXPERTS = {"num_experts": 4, "moe_router_topk": 2}
_ALL = {
    **_MEMORY,
    **_MAMBA,
    **_EXPERTS,
    "hybrid_layer_pattern": "M-*EM-",
    "num_layers": None,
    "ultramem_spans": "2:3/4:6",
}


def _run(**changes):
    return train(1, tiny_gpt(**{**_ALL, **changes}))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    return folder, _run(save=folder, save_interval=1)


_UNIFORM = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 4,
}
_BLOCK = {**_UNIFORM, "recompute_method": "block", "recompute_num_layers": 3}


def test_recomputation_changes_nothing(plain):
    assert_same_training(_run(**_UNIFORM), plain[1], 0.0)


@pytest.mark.long
@pytest.mark.parametrize("recompute", [_UNIFORM, _BLOCK], ids=["uniform", "block"])
def test_recomputation_draws_the_same_dropout(recompute):
    dropout = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
    assert_same_training(_run(**dropout, **recompute), _run(**dropout), 0.0)


def test_a_run_resumed_in_two_stages_goes_on_as_one_rank_does(plain):
    folder, run = plain
    stages = {"pipeline_model_parallel_size": 2, "hybrid_layer_pattern": "M-*E|M-"}  # cuts 4:6
    flags = tiny_gpt(**{**_ALL, **stages, "load": folder, "ckpt_step": 1})
    assert run_pretrain(2, flags).losses == pytest.approx(run.losses[1:], rel=AFTER_STEPS)


@pytest.mark.long
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(plain):
    folder, run = plain
    assert _run(load=folder, ckpt_step=1).losses == run.losses[1:]


def _in_gpt(name):
    """The name that a parameter of a `*-*-...` pattern has in the GPT."""
    name = name.replace("final_norm", "final_layernorm")
    name = re.sub(r"mtp_model_layer\.layers\.\d+", "mtp_model_layer", name)
    return re.sub(r"(?<=decoder\.layers\.)\d+", lambda found: str(int(found[0]) // 2), name)


def _fill_by_name():
    """Weights that depend on nothing but their name in the GPT; for `before`."""
    from megatron.training import training

    train = training.train

    @functools.wraps(train)
    def filled(step, model, *args, **kwargs):
        is_gpt = training.get_args().hybrid_layer_pattern is None
        for name, parameter in model[0].named_parameters():
            known_as = name if is_gpt else _in_gpt(name)
            generator = torch.Generator().manual_seed(zlib.crc32(known_as.encode()))
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(0.1 * noise + (parameter.dim() == 1 and name.endswith("weight")))
        for name, buffer in model[0].named_buffers():
            if name.endswith(("cores.u", "cores.t")):  # of the weights before; their sign stays
                buffer.zero_()
        return train(step, model, *args, **kwargs)

    training.train = filled


@pytest.mark.parametrize("later", [0, 2])
def test_a_pattern_of_attention_and_mlps_is_the_gpt(later):
    """later: heads for tokens after the next."""
    same = {**_MEMORY, "ultramem_value_expansion": 1}  # no shuffle, which is of the layer number
    gpt = {"num_layers": 4, "ultramem_spans": "2:3/4:4", "mtp_num_layers": later or None}
    pattern = "*-" * 4 + "/*-" * later
    hybrid = {"num_layers": None, "hybrid_layer_pattern": pattern, "ultramem_spans": "4:6/8:8"}
    runs = [
        run_pretrain(
            1, tiny_gpt(**same, **flags), gradients_at=1, parameters=True, before=_fill_by_name
        )
        for flags in (gpt, hybrid)
    ]
    assert runs[0].losses == runs[1].losses
    for kind in ("gradients", "parameters"):
        expected, found = (getattr(run.ranks[0], kind) for run in runs)
        assert {_in_gpt(name) for name in found} == expected.keys()
        for name, tensor in found.items():
            assert torch.equal(tensor, expected[_in_gpt(name)]), f"{kind} {name}"
