"""The example of a training loop on megatron.core alone: every layout trains as one rank does."""

import pytest

from tests.ranks import run_on_ranks
from tests.whole_model import AFTER_STEPS

STEPS = 6


def _losses(world_size, *flags):
    """Losses of rank 0 (all ranks return the same)."""
    every = run_on_ranks(world_size, _run, [str(flag) for flag in flags])
    assert all(losses == every[0] for losses in every)
    return every[0]


def _run(argv):
    from launch.own_loop import main

    return main(argv)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Losses of one rank over 2 * STEPS, and its checkpoint of step STEPS."""
    folder = tmp_path_factory.mktemp("own_loop")
    first = _losses(1, "--steps", STEPS, "--save", folder)
    whole = _losses(1, "--steps", 2 * STEPS)
    assert whole[:STEPS] == first
    assert whole[-1] < whole[0] - 0.1
    return whole, folder


@pytest.mark.parametrize(
    ("world_size", "flags"),
    [
        (1, []),
        (2, []),
        (2, ["--table-ranks", 2]),
        (2, ["--table-ranks", 2, "--partition", "number"]),
        (2, ["--tensor-ranks", 2]),
        (4, ["--tensor-ranks", 2, "--table-ranks", 4]),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, list) else None,
)
def test_a_layout_goes_on_from_the_checkpoint_of_one_rank(checkpoint, world_size, flags):
    whole, folder = checkpoint
    resumed = _losses(world_size, "--steps", 2 * STEPS, "--load", folder, *flags)
    assert resumed == pytest.approx(whole[STEPS:], rel=AFTER_STEPS)


def _rates():
    from launch import own_loop

    options = own_loop._parse([])
    own_loop.open_process()
    own_loop._initialise(options)
    _, optimizer = own_loop._build(options)
    scheduler = own_loop._scheduler(optimizer)
    first = {group["lr"] for group in optimizer.param_groups}
    scheduler.step(own_loop.TRAINING_STEPS)
    return first, {group["lr"] for group in optimizer.param_groups}


def test_tables_learn_at_their_own_rate():
    first, last = run_on_ranks(1, _rates)[0]
    assert first == {1e-3, 4e-3}
    assert last == {1e-3}
