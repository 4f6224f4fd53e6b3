"""Trainings started as a user starts them, by launch/torchrun.sh, for tests that hurt them.

with launch(folder) as run:
    run.wait_for_iteration(7)
    os.kill(run.ranks()[0], signal.SIGKILL)
    assert run.wait() == 0
run.losses()          # iteration -> loss as last printed
"""

import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests import ROOT
from tests.training_runs import tiny_gpt

_ITERATION = re.compile(r"iteration +(\d+)/ +\d+ .*lm loss: (\S+)")
FOUND = "Timed out waiting|Application timeout caused|[Cc]onnection (closed|reset) by peer"
"""What a rank says of a peer that is gone: its first collective that fails decides which."""
RESUMED = rf"(?s)({FOUND}).*loading distributed checkpoint"


def flags(folder: Path, **changes: Any) -> list[str]:
    """A tiny GPT with one memory that saves every five iterations and resumes by itself."""
    settings: dict[str, Any] = {
        "ultramem_spans": "1:2",
        "ultramem_num_keys": 12,
        "ultramem_topk": 6,
        "hidden_dropout": 0.1,
        "ckpt_format": "torch_dist",
        "train_iters": 20,
        "save_interval": 5,
        "save": folder / "checkpoints",
        "load": folder / "checkpoints",
        "load_or_start": True,
    }
    return tiny_gpt(**{**settings, **changes})


def children(pid: int) -> list[int]:
    """Processes started by `pid` and still there."""
    tasks = Path(f"/proc/{pid}/task")
    return [int(c) for t in tasks.glob("*/children") for c in t.read_text().split()]


def command_of(pid: int) -> str:
    """Command line of a process; empty once it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def is_running(pid: int) -> bool:
    """False for what is gone, or dead and not yet reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def descendants(pid: int) -> list[int]:
    """All processes below `pid`."""
    below = children(pid)
    return below + [further for child in below for further in descendants(child)]


def losses_of(output: str) -> dict[int, str]:
    """Iteration -> loss as last printed, in all its digits.

    An attempt begins where iterations do not grow. Without its second iteration: Megatron prints
    the mean of the first two.
    """
    losses: dict[int, str] = {}
    last = since_start = 0
    for step, loss in ((int(step), loss) for step, loss in _ITERATION.findall(output)):
        since_start = since_start + 1 if step > last else 1
        last = step
        if since_start != 2:
            losses[step] = loss
    return losses


def printed_losses(logs: Path) -> dict[int, str]:
    """`losses_of` all attempts below `logs`, from the ranks' own files.

    They are in order; in what torchrun prints, a restart at the next iteration cannot be seen.
    """
    files = logs.glob("*/attempt_*/*/stdout.log")
    losses: dict[int, str] = {}
    for file in sorted(files, key=lambda file: (file.stat().st_mtime, file)):
        losses.update(losses_of(file.read_text(errors="replace")))
    return losses


@dataclass
class Launched:
    """A running or finished launch."""

    process: "subprocess.Popen[bytes]"
    log: Path
    logs: Path
    """Folder of the ranks' own logs."""

    def output(self) -> str:
        """Everything printed up to now."""
        return self.log.read_text(errors="replace")

    def _end(self) -> str:
        """What was printed last, past the start's long list of arguments."""
        return "\n".join(self.output().splitlines()[-60:])

    def losses(self) -> dict[int, str]:
        """See `printed_losses`."""
        return printed_losses(self.logs)

    def iterations(self) -> list[int]:
        """Every iteration in the order it was trained, repeats included."""
        return [int(iteration) for iteration, _ in _ITERATION.findall(self.output())]

    def agent(self) -> int:
        """The torchrun process."""
        return next(
            p for p in descendants(self.process.pid) if "torch.distributed.run" in command_of(p)
        )

    def ranks(self) -> list[int]:
        """The training processes, in no order."""
        return [
            p
            for p in children(self.agent())
            if "ultramem_megatron train" in command_of(p) and "distributed.run" not in command_of(p)
        ]

    def wait_for_iteration(self, iteration: int, seconds: float = 120.0) -> None:
        """Return as soon as the log shows it."""
        self.wait_for(rf"iteration +{iteration}/", seconds)

    def wait_for(self, pattern: str, seconds: float = 120.0) -> None:
        """Return as soon as the log matches."""
        until = time.monotonic() + seconds
        while not re.search(pattern, self.output()):
            assert self.process.poll() is None, f"ended before {pattern!r}:\n{self._end()}"
            assert time.monotonic() < until, f"no {pattern!r}:\n{self._end()}"
            time.sleep(0.02)

    def wait(self, seconds: float = 180.0) -> int:
        """The exit status."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds} s:\n{self._end()}") from None


@contextmanager
def launch(
    folder: Path,
    arguments: Sequence[str] | None = None,
    env: Mapping[str, str] | None = None,
    prefix: Sequence[str] = (),
    name: str = "out",
) -> Iterator[Launched]:
    """Start launch/torchrun.sh with two ranks; whatever is left of it is killed at the end.

    Args:
        folder: for checkpoints and logs.
        arguments: Megatron's flags; None: `flags(folder)`.
        env: further environment variables.
        prefix: words before the command, such as those that enter a network namespace.
        name: of the file that takes the output.
    """
    log = folder / f"{name}.log"
    command = [*prefix, "bash", str(ROOT / "launch" / "torchrun.sh")]
    command += flags(folder) if arguments is None else list(arguments)
    logs = folder / f"{name}_logs"
    environment = {**os.environ, "NPROC": "2", "LOG_DIR": str(logs), **(env or {})}
    with log.open("wb") as file:
        file.write(f"$ {shlex.join(command)}\n".encode())
        file.flush()
        process = subprocess.Popen(
            command, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield Launched(process, log, logs)
    finally:
        for pid in (process.pid, *descendants(process.pid)):  # ranks end with their agent
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
