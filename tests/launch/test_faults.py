"""What launch/torchrun.sh promises when processes die, hang or are told to stop."""

import os
import signal
import time

import pytest

from tests.launched import Launched, launch

SAVE_INTERVAL = 5


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Losses of the run that nothing happens to."""
    with launch(tmp_path_factory.mktemp("undisturbed")) as run:
        assert run.wait() == 0, run.output()
    assert sorted(run.losses()) == [1, *range(3, 21)]
    return run.losses()


def _repeated(run: Launched) -> int:
    """Iterations trained more than once."""
    return len(run.iterations()) - len(set(run.iterations()))


def _assert_same_curve(undisturbed: dict[int, str], *runs: Launched) -> None:
    """Every loss the runs printed is that of the undisturbed run, up to its end."""
    seen = {step: loss for run in runs for step, loss in run.losses().items() if step != 2}
    assert {step: undisturbed[step] for step in seen} == seen
    assert 20 in seen
    assert len(seen) >= 17


def _seconds_to_train_again(run: Launched, after: str) -> float:
    started = time.monotonic()
    run.wait_for(after)
    return time.monotonic() - started


@pytest.mark.slow
def test_sigterm_saves_and_the_next_launch_continues(undisturbed, tmp_path):
    with launch(tmp_path) as first:
        first.wait_for_iteration(7)
        os.kill(first.process.pid, signal.SIGTERM)
        assert first.wait() == 0, first.output()
    stopped_at = first.iterations()[-1]
    assert 7 <= stopped_at < 20
    assert (tmp_path / "checkpoints/latest_checkpointed_iteration.txt").read_text() == str(
        stopped_at
    )
    with launch(tmp_path, name="second") as second:
        assert second.wait() == 0, second.output()
    assert second.iterations() == list(range(stopped_at + 1, 21))
    _assert_same_curve(undisturbed, first, second)


@pytest.mark.slow
def test_a_killed_rank_is_replaced(undisturbed, tmp_path):
    with launch(tmp_path) as run:
        run.wait_for_iteration(8)
        os.kill(run.ranks()[0], signal.SIGKILL)
        seconds = _seconds_to_train_again(run, r"(?s)exitcode: -9.*loading distributed checkpoint")
        assert run.wait() == 0, run.output()
    print(f"killed rank: {seconds:.1f} s to resume, {_repeated(run)} steps repeated")
    _assert_same_curve(undisturbed, run)
    assert 0 < _repeated(run) <= SAVE_INTERVAL
    assert "exitcode: -9" in run.output()
    assert seconds < 60
