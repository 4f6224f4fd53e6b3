"""What matrix optimizers leave to the scalar one."""

import pytest

from tests.training_runs import tiny_gpt
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
