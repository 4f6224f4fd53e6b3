"""What matrix optimizers leave to the scalar one, and --use-mup to the base rate."""

import pytest
import torch

from tests.training_runs import run_pretrain, tiny_gpt
from tests.whole_model import STEADY, train, whole

_FLAGS = {
    "ultramem_spans": "1:2",
    "ultramem_num_keys": 11,
    "ultramem_topk": 6,
    "ultramem_query_conv_kernel": 3,
    "disable_bias_linear": True,
    "train_iters": 1,
    **STEADY,
}
_STEP = 1e-3  # of Adam on the taps; on the tables four times that
_LEFT = ("memory.values.weight", "memory.query.conv.weight")


def _moved(world_size, **changes):
    """Parameters after one step that a matrix optimizer leaves alone, by name."""
    run = train(world_size, tiny_gpt(**{**_FLAGS, **changes}))
    return {name: t for left in _LEFT for name, t in whole(run, "parameters", left).items()}


@pytest.fixture(scope="module")
def with_adam():
    return _moved(1)


@pytest.mark.parametrize(
    ("world_size", "changes"),
    [
        (1, {"optimizer": "muon"}),
        (2, {"optimizer": "muon"}),
        (2, {"optimizer": "muon", "ultramem_partition": "number"}),
        (1, {"optimizer": "soap"}),
        (2, {"optimizer": "lion"}),
    ],
    ids=str,
)
def test_tables_and_taps_move_as_with_adam_in_every_layout(with_adam, world_size, changes):
    found = _moved(world_size, **changes)
    assert found.keys() == with_adam.keys()
    assert len(found) == len(_LEFT)
    for name, expected in with_adam.items():
        # Adam divides a gradient by its size: where that is rounding, so is part of the move.
        assert (found[name] - expected).abs().max().item() < _STEP / 1000, name


@pytest.mark.parametrize("changes", [{}, {"ultramem_parallel_size": 1}], ids=str)
def test_the_layer_wise_optimizer_trains_what_each_rank_trains_whole(changes):
    flags = {**_FLAGS, "optimizer": "muon", "bf16": True, **changes}
    expected = whole(train(4, tiny_gpt(**flags)), "parameters")
    found = whole(train(4, tiny_gpt(**flags, use_distributed_optimizer=True)), "parameters")
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def _groups(trained):
    named = {id(p): n for chunk in trained.model for n, p in chunk.named_parameters()}
    return {
        named[id(parameter)].rsplit("memory.")[-1]: (group["max_lr"], group["weight_decay"])
        for group in trained.optimizer.param_groups
        for parameter in group["params"]
        if "memory." in named[id(parameter)]
    }


def test_mup_keeps_the_rate_of_what_sums_over_no_width():
    flags = {"use_mup": True, "mup_base_hidden_size": 16, "weight_decay": 0.1}
    run = run_pretrain(
        1, tiny_gpt(**{**_FLAGS, **flags, "ultramem_value_wd_mult": 0.5}), on_finish=_groups
    )
    groups = run.ranks[0].finished
    base, half = 1e-3, 5e-4  # --lr; the model is twice as wide as the base
    assert groups["values.weight"] == (base, pytest.approx(0.05))
    for kept in ("query.conv.weight", "retrieval.cores.weight"):
        assert groups[kept] == (base, 0.1)
    for scaled in ("query.proj.weight", "value_proj.weight", "retrieval.keys.weight"):
        assert groups[scaled] == (half, 0.1)
