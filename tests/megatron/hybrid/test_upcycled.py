"""A HybridModel that starts from a GPT's checkpoint, with memories and without."""

from argparse import Namespace

import pytest

from tests.ranks import RanksFailed
from tests.training_runs import run_pretrain, tiny_gpt
from tests.whole_model import LOSS
from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.megatron.checkpoint.gpt_layers import read_as_gpt

_GPT = {"num_layers": 2, "ckpt_format": "torch_dist", "disable_bias_linear": True}
_HYBRID = {"num_layers": None, "hybrid_layer_pattern": "*-*-"}
_MEMORY = {"ultramem_spans": "2:3/4:4", "ultramem_num_keys": 12, "ultramem_topk": 6}
_STILL = {"lr": 0.0, "min_lr": 0.0, "train_iters": 2}
_EXPERTS = {"num_experts": 4, "moe_router_load_balancing_type": "none"}
_long = pytest.mark.long


def _saved(folder, **changes):
    """A GPT after two steps, and the losses that it has from there without learning."""
    learning = {"train_iters": 2, "lr": 1e-2, "save": folder, "save_interval": 2}
    run_pretrain(1, tiny_gpt(**{**_GPT, **learning, **changes}))
    return run_pretrain(
        1, tiny_gpt(**{**_GPT, **_STILL, "load": folder, "finetune": True, **changes})
    ).losses


@pytest.fixture(scope="module")
def gpt(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt")
    return folder, _saved(folder)


def _losses(folder, ranks=1, **changes):
    start = {"ultramem_upcycle": folder, **_MEMORY, **_HYBRID, **_STILL}
    flags = tiny_gpt(**{**_GPT, **start, **changes})
    return run_pretrain(ranks, flags, print_output=True).losses


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (1, {}),
        pytest.param(2, {"tensor_model_parallel_size": 2}, marks=_long),
        pytest.param(
            2, {"pipeline_model_parallel_size": 2, "hybrid_layer_pattern": "*-|*-"}, marks=_long
        ),
    ],
)
def test_without_learning_the_loss_is_the_gpts(gpt, ranks, layout):
    folder, losses = gpt
    assert _losses(folder, ranks, **layout) == pytest.approx(losses, rel=LOSS)


@_long
@pytest.mark.parametrize("apart", [{}, {"moe_layer_freq": "[1]*2"}], ids=["stack", "apart"])
def test_experts_start_from_a_gpts(tmp_path, apart):
    """apart: the checkpoint has keys for each layer."""
    changes = {**_EXPERTS, **apart}
    losses = _saved(tmp_path, **changes)
    found = _losses(tmp_path, **changes, hybrid_layer_pattern="*E*E")
    assert found == pytest.approx(losses, rel=LOSS)


@_long
def test_mamba_layers_start_anew_among_a_gpts(gpt, capfd):
    """And the log says so."""
    mamba = {"mamba_head_dim": 8, "mamba_num_groups": 2, "hybrid_layer_pattern": "*-M*-"}
    losses = _losses(gpt[0], **mamba, ultramem_spans="2:3/5:5")
    assert losses != pytest.approx(gpt[1], rel=LOSS)
    assert losses == pytest.approx(gpt[1], rel=0.1)
    assert capfd.readouterr().out.count("layers 3 of *-M*- (Mamba) have no counterpart") == 1


@_long
def test_without_memories_a_gpt_goes_on_as_a_hybrid_model(gpt):
    on = {**_GPT, "load": gpt[0], "train_iters": 4, "lr": 1e-2}
    on["override_opt_param_scheduler"] = True
    expected = run_pretrain(1, tiny_gpt(**on)).losses
    assert len(expected) == 2
    assert run_pretrain(1, tiny_gpt(**{**on, **_HYBRID})).losses == expected


@_long
def test_a_hybrid_model_is_upcycled_as_a_gpt_is(tmp_path):
    pattern = {**_HYBRID, "hybrid_layer_pattern": "*-M-"}
    mamba = {"mamba_head_dim": 8, "mamba_num_groups": 2}
    losses = _saved(tmp_path, **pattern, **mamba)
    assert _losses(tmp_path, **pattern, **mamba) == pytest.approx(losses, rel=LOSS)


@_long
def test_a_gpt_of_other_layers_is_refused(gpt):
    with pytest.raises(RanksFailed, match="num_layers is 3 here, 2 in the checkpoint"):
        _losses(gpt[0], hybrid_layer_pattern="*-*-*-")


def test_a_pattern_that_is_no_gpts_is_refused():
    of_gpt = Namespace(num_layers=2, mamba_head_dim=64)
    for pattern, message in (("*-M-", "1 attention .* and 2 MLP"), ("*-G-", "'G'")):
        with pytest.raises(UltraMemError, match=message):
            read_as_gpt(Namespace(hybrid_layer_pattern=pattern, num_layers=4), of_gpt)


def test_a_pattern_is_read_as_the_gpt_of_its_pairs():
    mine = Namespace(hybrid_layer_pattern="*-M|*-", num_layers=5, mamba_head_dim=8)
    read = read_as_gpt(mine, Namespace(num_layers=2, mamba_head_dim=64))
    assert (read.num_layers, read.hybrid_layer_pattern, read.mamba_head_dim) == (2, None, 64)
    assert read_as_gpt(mine, mine) is mine
