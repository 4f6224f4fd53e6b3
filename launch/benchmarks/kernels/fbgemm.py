"""FBGEMM's table-batched embedding beside the lookup, in an environment of its own.

FBGEMM is built for one version of PyTorch. launch/benchmarks/setup_fbgemm.sh makes a folder with
both ($FBGEMM_ENV, by default .venv-fbgemm); where there is none, the row is left out by name. There

    python -m launch.benchmarks.kernels.fbgemm FIELDS

with the fields of a Shape and the error allowed, in JSON, checks it against the reference, times it
and prints its rows in JSON, with that PyTorch's version.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from launch.benchmarks.kernels import lookups
from launch.benchmarks.kernels.candidate import check
from launch.benchmarks.kernels.shapes import Shape
from launch.benchmarks.kernels.timings import timings
from ultramem_megatron.errors import UltraMemError

Row = dict[str, Any]
_ROOT = Path(__file__).parents[3]


def environment() -> Path:
    """The Python that has FBGEMM."""
    return Path(os.environ.get("FBGEMM_ENV", _ROOT / ".venv-fbgemm")) / "bin" / "python"


def rows(shape: Shape, device: torch.device, tolerance: float) -> Iterator[Row]:
    """A row a pass, as `run.py` has them, timed there. Raises UltraMemError where it fails."""
    python = environment()
    if device.type != "cpu":
        print("  FBGEMM left out: its environment is for CPUs")
        return
    if not python.exists():
        print(f"  FBGEMM left out: no {python}; bash launch/benchmarks/setup_fbgemm.sh makes it")
        return
    asked = {**asdict(shape), "dtype": str(shape.dtype), "error": tolerance}
    done = subprocess.run(
        [python, "-m", f"{__package__}.fbgemm", json.dumps(asked)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(_ROOT), "OMP_NUM_THREADS": "1"},
    )
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        raise UltraMemError(
            f"FBGEMM in {python} ended with status {done.returncode}: {''.join(last)} Make its "
            f"environment anew (launch/benchmarks/setup_fbgemm.sh), or take it away to go without."
        )
    yield from json.loads(done.stdout.splitlines()[-1])


def measured(asked: Row) -> list[Row]:
    """What the other process does; asked: as `rows` sends it."""
    device, tolerance = torch.device("cpu"), asked.pop("error")
    shape = Shape(**{**asked, "dtype": getattr(torch, asked["dtype"].removeprefix("torch."))})
    torch.set_num_threads(1)
    torch.manual_seed(1)
    reference, *_, fbgemm = lookups.candidates(shape, device, with_fbgemm=True)
    errors = check([reference, fbgemm], tolerance)
    return [
        {**row, "error": errors[fbgemm.name], "torch": torch.__version__}
        for row in timings(fbgemm, device)
    ]


if __name__ == "__main__":
    print(json.dumps(measured(json.loads(sys.argv[1]))))
