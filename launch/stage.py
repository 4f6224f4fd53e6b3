"""Runs one program of an experiment: full log in a file, its progress in one line."""

import re
import shlex
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TextIO

LAST_LINES = 25  # of the log, shown when a stage fails
SECONDS_BETWEEN_LINES = 10.0  # where the output is not a terminal that can redraw a line

_STEP = re.compile(
    r"iteration\s+(\d+)/\s*(\d+) \|.* elapsed time per iteration \(ms\): ([\d.]+) "
    r"\|.* lm loss: (\S+) \|"
)
# torchrun reports a dead rank at length; what the rank itself said comes before.
_LAUNCHER = re.compile(r"torch/distributed/elastic/multiprocessing/\w+\.py:\d+\]")
_VALIDATION = re.compile(r"validation loss at iteration (\d+) \| lm loss value: (\S+) \|")


class StageError(RuntimeError):
    """A stage failed; the message names it, its log and the log's last lines."""


def run(
    name: str,
    command: Sequence[str],
    log: Path,
    environment: Mapping[str, str],
    on_line: Callable[[str], None] | None = None,
    output: Path | None = None,
) -> None:
    """Runs a command to its end, with what it prints in `log`.

    Args:
        name: of the stage, for the message.
        command: program and arguments.
        log: file to write; its first line is the command.
        environment: the command's environment variables.
        on_line: called with each line of the log.
        output: file for the standard output alone, which then is not in the log.

    Raises:
        StageError: the command failed.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    last: deque[str] = deque(maxlen=LAST_LINES)
    with log.open("w", encoding="utf-8") as file, ExitStack() as closing:
        file.write("$ " + shlex.join(command) + "\n")
        process = subprocess.Popen(
            command,
            env=dict(environment),
            stdout=closing.enter_context(output.open("wb")) if output else subprocess.PIPE,
            stderr=subprocess.PIPE if output else subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
        )
        try:
            _follow(process, file, last, on_line)
        except BaseException:  # also an interrupt: leave no ranks behind
            process.terminate()
            process.wait()
            raise
    if process.returncode:
        raise StageError(
            f"stage '{name}' failed with exit status {process.returncode}.\n"
            f"The last lines of {log}:\n" + "".join(f"  | {line}" for line in last)
        )


def _follow(
    process: subprocess.Popen[str],
    file: TextIO,
    last: deque[str],
    on_line: Callable[[str], None] | None,
) -> None:
    lines = process.stdout or process.stderr
    assert lines is not None, "one of them is a pipe"
    telling = True
    for line in lines:
        file.write(line)
        file.flush()
        telling = telling and not _LAUNCHER.search(line)
        if telling:
            last.append(line if line.endswith("\n") else line + "\n")
        if on_line is not None:
            on_line(line)
    process.wait()


class TrainingProgress:
    """Reduces Megatron's log to a line that is redrawn, or written now and then.

    Attributes:
        first_step: number of the first optimizer step that was seen, None before it.
    """

    def __init__(self, tokens_per_step: int, output: TextIO = sys.stdout) -> None:
        self.first_step: int | None = None
        self._tokens_per_step = tokens_per_step
        self._output = output
        self._times: deque[float] = deque(maxlen=20)  # seconds per step, recent
        self._redraw = output.isatty()
        self._shown_at = -SECONDS_BETWEEN_LINES

    def __call__(self, line: str) -> None:
        """Takes one line of the log."""
        if match := _STEP.search(line):
            self._step(int(match[1]), int(match[2]), float(match[3]) / 1000, float(match[4]))
        elif match := _VALIDATION.search(line):
            self._write(f"step {match[1]:>5}  validation loss {float(match[2]):.3f}", keep=True)

    def _step(self, step: int, steps: int, seconds: float, loss: float) -> None:
        if self.first_step is None:
            self.first_step = step
        self._times.append(seconds)
        typical = sorted(self._times)[len(self._times) // 2]
        left = round(typical * (steps - step))
        text = (
            f"step {step:>5}/{steps}  loss {loss:.3f}  "
            f"{self._tokens_per_step / typical:,.0f} tokens/s  {left // 60}:{left % 60:02d} left"
        )
        now = time.monotonic()
        if self._redraw or step == steps or now - self._shown_at >= SECONDS_BETWEEN_LINES:
            self._shown_at = now
            self._write(text, keep=step == steps)

    def _write(self, text: str, keep: bool) -> None:
        end = "\n" if keep or not self._redraw else ""
        start = "\r\033[K" if self._redraw else ""
        self._output.write(f"{start}  {text}{end}")
        self._output.flush()
