"""The benchmarks of whole models and of overlap, shortened; what they write becomes rows."""

import csv
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from launch.gpu_report.row import Row

_POLL_SECONDS = 0.2


def written(benchmark: str, flags: str) -> Iterator[dict[str, str]]:
    """The rows of the one CSV that `ultramem bench BENCHMARK` writes, as they are made.

    So a part that its time limit stops has those before.
    """
    root = str(Path(__file__).parents[3])
    env = {**os.environ, "PYTHONPATH": root, "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", f"launch.benchmarks.{benchmark}", *flags.split()]
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as said:
        command += ["--out", folder]
        with subprocess.Popen(command, env=env, stdout=said, stderr=said, text=True) as running:
            given = 0
            while True:
                ended = running.poll() is not None
                found = _whole_rows(Path(folder))
                yield from found[given:]
                given = len(found)
                if ended:
                    break
                time.sleep(_POLL_SECONDS)
        said.seek(0)
        if running.returncode and (failure := _failure(said.read())):
            raise RuntimeError(failure)


def _failure(said: str) -> str:
    """What it ended with; nothing where only the picture is missing, which comes after all rows."""
    return "" if "needs matplotlib" in said else " / ".join(said.splitlines()[-3:])


def _whole_rows(folder: Path) -> list[dict[str, str]]:
    """Of the folder's CSV, without a line that is being written."""
    for file in folder.glob("*.csv"):
        text = file.read_text(encoding="utf-8")
        return list(csv.DictReader(text[: text.rfind("\n") + 1].splitlines()))
    return []


def quotients(
    found: dict[tuple[str, str], float], pairs: dict[str, tuple[str, str]], at: str
) -> Iterator[Row]:
    """Row name -> its quotient of two models' numbers, at each `where` of `found`."""
    for words, (over, under) in pairs.items():
        for name, where in found:
            if name == over and (under, where) in found:
                value = round(found[over, where] / found[under, where], 2)
                yield Row(what=words.format(at.format(where)), value=value)
