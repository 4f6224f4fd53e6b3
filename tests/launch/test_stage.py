"""Running a stage: log, progress line, and what a failure tells."""

import io
import os
import sys
from pathlib import Path

import pytest

from launch import stage

STEP = (
    " [2026-01-01 00:00:00.0] iteration {step:8d}/     200 | consumed samples:           16 | "
    "elapsed time per iteration (ms): {ms:.1f} | learning rate: 1.666667E-03 | "
    "global batch size:    16 | lm loss: {loss:.6E} | loss scale: 1.0 | grad norm: 5.566 |\n"
)
VALIDATION = (
    " validation loss at iteration 3 | lm loss value: 8.121432E+00 | lm loss PPL: 3E+03 |\n"
)


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_log_holds_the_command_and_all_it_printed(tmp_path: Path) -> None:
    log, seen = tmp_path / "logs" / "x.log", list[str]()
    code = "import os, sys; print('out', os.environ['X']); print('err', file=sys.stderr)"
    stage.run("x", python(code), log, {**os.environ, "X": "value"}, seen.append)
    first, *rest = log.read_text().splitlines()
    assert first.startswith("$ ")
    assert "print('\"'\"'err" in first  # quoted, so that it can be pasted into a shell
    assert sorted(rest) == ["err", "out value"]
    assert sorted(seen) == ["err\n", "out value\n"]


def test_output_can_go_to_a_file_of_its_own(tmp_path: Path) -> None:
    code = "import sys; print('text'); print('noise', file=sys.stderr)"
    log, output = tmp_path / "x.log", tmp_path / "x.txt"
    stage.run("x", python(code), log, os.environ, output=output)
    assert output.read_text() == "text\n"
    assert log.read_text().splitlines()[1:] == ["noise"]


def test_failure_names_stage_status_log_and_its_last_lines(tmp_path: Path) -> None:
    code = "import sys; [print('line', i) for i in range(100)]; sys.exit(3)"
    log = tmp_path / "x.log"
    with pytest.raises(stage.StageError) as error:
        stage.run("train", python(code), log, os.environ)
    message = str(error.value)
    assert "stage 'train' failed with exit status 3" in message
    assert str(log) in message
    assert "| line 99" in message
    assert "| line 74\n" not in message


def test_last_lines_are_the_ranks_own_not_the_launchers(tmp_path: Path) -> None:
    code = """
print("ValueError: the reason")
print("W1 x/torch/distributed/elastic/multiprocessing/api.py:10] Sending process 1 SIGTERM")
for i in range(100):
    print("launcher's own traceback")
raise SystemExit(1)
"""
    with pytest.raises(stage.StageError) as error:
        stage.run("train", python(code), tmp_path / "x.log", os.environ)
    assert "| ValueError: the reason" in str(error.value)
    assert "launcher" not in str(error.value)
    assert "launcher's own" in (tmp_path / "x.log").read_text()


def test_error_in_following_ends_the_command(tmp_path: Path) -> None:
    code = "import time, os; print(os.getpid(), flush=True); time.sleep(60)"
    started: list[int] = []

    def fail(line: str) -> None:
        started.append(int(line))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stage.run("x", python(code), tmp_path / "x.log", os.environ, fail)
    with pytest.raises(ProcessLookupError):
        os.kill(started[0], 0)


def test_progress_line_gives_loss_speed_and_time_left() -> None:
    output = io.StringIO()
    progress = stage.TrainingProgress(tokens_per_step=4096, output=output)
    progress("noise that says iteration 7 of nothing\n")
    assert progress.first_step is None
    progress(STEP.format(step=80, ms=2000.0, loss=5.25))
    assert output.getvalue() == "  step    80/200  loss 5.250  2,048 tokens/s  4:00 left\n"
    assert progress.first_step == 80


def test_progress_is_not_repeated_at_once_but_validation_and_the_end_are_shown() -> None:
    output = io.StringIO()
    progress = stage.TrainingProgress(tokens_per_step=4096, output=output)
    for step in range(190, 201):
        progress(STEP.format(step=step, ms=1000.0, loss=5))
        if step == 195:
            progress(VALIDATION)
    shown = [line.split()[1] for line in output.getvalue().splitlines()]
    assert shown == ["190/200", "3", "200/200"]
    assert "validation loss 8.121" in output.getvalue()


def test_terminal_line_is_redrawn() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    output = Terminal()
    progress = stage.TrainingProgress(tokens_per_step=4096, output=output)
    progress(STEP.format(step=198, ms=1000.0, loss=5))
    progress(STEP.format(step=199, ms=1000.0, loss=5))
    assert output.getvalue().count("\r\033[K") == 2
    assert "\n" not in output.getvalue()
    progress(STEP.format(step=200, ms=1000.0, loss=5))
    assert output.getvalue().endswith("0:00 left\n")
