"""What launch/torchrun.sh promises when processes die, hang or are told to stop."""

import os
import signal
import time

import pytest

from tests.launched import FOUND, RESUMED, Launched, flags, is_running, launch
from tests.training_runs import IN_BACKGROUND
from ultramem_megatron.presets.flags import as_words

SAVE_INTERVAL = 5
_IN_BACKGROUND = as_words(IN_BACKGROUND)


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


def _seconds_until(run: Launched, pattern: str) -> float:
    started = time.monotonic()
    run.wait_for(pattern)
    return time.monotonic() - started


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], _IN_BACKGROUND], ids=["synchronous", "asynchronous"])
def test_sigterm_saves_and_the_next_launch_continues(more, undisturbed, tmp_path):
    with launch(tmp_path, [*flags(tmp_path), *more]) as first:
        first.wait_for_iteration(7)
        os.kill(first.process.pid, signal.SIGTERM)
        assert first.wait() == 0, first.output()
    stopped_at = first.iterations()[-1]
    assert 7 <= stopped_at < 20
    assert (tmp_path / "checkpoints/latest_checkpointed_iteration.txt").read_text() == str(
        stopped_at
    )
    with launch(tmp_path, [*flags(tmp_path), *more], name="second") as second:
        assert second.wait() == 0, second.output()
    assert second.iterations() == list(range(stopped_at + 1, 21))
    _assert_same_curve(undisturbed, first, second)


@pytest.mark.slow
def test_a_killed_rank_is_replaced(undisturbed, tmp_path):
    with launch(tmp_path) as run:
        run.wait_for_iteration(8)
        os.kill(run.ranks()[0], signal.SIGKILL)
        seconds = _seconds_until(run, r"(?s)exitcode: -9.*loading distributed checkpoint")
        assert run.wait() == 0, run.output()
    print(f"killed rank: {seconds:.1f} s to resume, {_repeated(run)} steps repeated")
    _assert_same_curve(undisturbed, run)
    assert _repeated(run) <= SAVE_INTERVAL
    assert "exitcode: -9" in run.output()
    assert seconds < 60


@pytest.mark.slow
def test_ranks_end_with_a_killed_agent(undisturbed, tmp_path):
    with launch(tmp_path) as first:
        first.wait_for_iteration(8)
        ranks = first.ranks()
        started = time.monotonic()
        os.kill(first.agent(), signal.SIGKILL)
        assert first.wait() == 128 + signal.SIGKILL
        while any(is_running(rank) for rank in ranks):
            assert time.monotonic() < started + 10
            time.sleep(0.02)
        seconds = time.monotonic() - started
    assert "torchrun was killed (signal 9)" in first.output()
    with launch(tmp_path, name="second") as second:
        assert second.wait() == 0, second.output()
    repeated = len(set(first.iterations()) & set(second.iterations()))
    print(f"killed agent: ranks gone after {seconds:.1f} s, {repeated} steps repeated")
    _assert_same_curve(undisturbed, first, second)
    assert repeated <= SAVE_INTERVAL


@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_attempt(undisturbed, tmp_path):
    stall = 5
    with launch(tmp_path, env={"STALL_SECONDS": str(stall)}) as run:
        run.wait_for_iteration(8)
        os.kill(run.ranks()[0], signal.SIGSTOP)
        found = _seconds_until(run, FOUND)
        seconds = found + _seconds_until(run, RESUMED)
        assert run.wait() == 0, run.output()
    print(
        f"hanging rank: {found:.1f} s to detect, {seconds:.1f} s to resume,"
        f" {_repeated(run)} steps repeated"
    )
    _assert_same_curve(undisturbed, run)
    assert stall - 1 <= found < stall + 10
    assert _repeated(run) <= SAVE_INTERVAL
