"""The benchmarks of whole models and of overlap, shortened; what they write becomes rows."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from launch.gpu_report.row import Row
from ultramem_megatron.tools.rows import read


def written(benchmark: str, flags: str) -> Iterator[dict[str, str]]:
    """The rows of the one CSV that `ultramem bench BENCHMARK` writes."""
    root = str(Path(__file__).parents[3])
    env = {**os.environ, "PYTHONPATH": root, "PYTHONWARNINGS": "ignore"}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", f"launch.benchmarks.{benchmark}", *flags.split()]
        done = subprocess.run([*command, "--out", folder], env=env, capture_output=True, text=True)
        files = sorted(Path(folder).glob("*.csv"))
        if files:  # rows are written as they are made
            yield from read(files[0], f"ultramem bench {benchmark}")
        if done.returncode:
            raise RuntimeError(" / ".join((done.stdout + done.stderr).splitlines()[-3:]))


def quotients(
    found: dict[tuple[str, str], float], pairs: dict[str, tuple[str, str]], at: str
) -> Iterator[Row]:
    """Row name -> its quotient of two models' numbers, at each `where` of `found`."""
    for words, (over, under) in pairs.items():
        for name, where in found:
            if name == over and (under, where) in found:
                value = round(found[over, where] / found[under, where], 2)
                yield Row(what=words.format(at.format(where)), value=value)
