"""What this project does on a GPU, in one report: right or wrong, how fast, beside what is known.

    ultramem gpu-report --out DIR [--minutes 9] [--only parity,kernels]

Each part is a process of its own with a time limit; a failure is a row, not the end, and the report
is written anew after each part. Without a GPU it runs what can run on a CPU, small, and says so.
Writes DIR/report.json and DIR/report.md.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.gpu_report import page
from ultramem_megatron.errors import UltraMemError, exit_on_user_error

_ROOT = Path(__file__).parents[2]
_FOLDER = "launch.gpu_report.parts"
PARTS = {
    "environment": 1.0,
    "parity": 2.0,
    "kernels": 2.0,
    "layer": 1.0,
    "trainings": 3.0,
    "decode": 2.0,
    "speed": 3.0,
    "overlap": 1.0,
}
"""In order of value; the minutes that each may take, less where fewer are left."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the parts. Raises UltraMemError."""
    options = _parse(argv)
    import torch

    large = torch.cuda.is_available()
    if not large:
        print("There is no NVIDIA GPU here: small shapes on the CPU, which say that all runs.")
    parts = {f"{_FOLDER}.{name}": PARTS[name] for name in options.only}
    run_parts(options.out, parts, options.minutes, large)
    print(f"{options.out / 'report.md'} and report.json")


def run_parts(folder: Path, parts: dict[str, float], minutes: float, large: bool) -> None:
    """Each module of `parts` in turn, with its minutes; all in `minutes`."""
    folder.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * minutes
    found: dict[str, list[dict[str, Any]]] = {}
    for module, limit in parts.items():
        name = module.rpartition(".")[2]
        print(f"{name}:", flush=True)
        left = end - time.monotonic()
        seconds = min(60 * limit, left)
        found[name] = (
            _rows_of(module, seconds, large)
            if seconds > 1
            else [_failure(name, f"not begun: --minutes {minutes:g} are over")]
        )
        page.write(folder, found)


def _rows_of(module: str, seconds: float, large: bool) -> list[dict[str, Any]]:
    """The rows of a part, and how it ended, where that was not of itself."""
    name = module.rpartition(".")[2]
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "rows"
        file.touch()
        command = [sys.executable, "-m", "launch.gpu_report.run_part", module, str(file)]
        threads = {} if large else {"OMP_NUM_THREADS": "1"}
        env = {**os.environ, **threads, "PYTHONPATH": str(_ROOT)}
        process = subprocess.Popen(
            [*command, *(["--large"] if large else [])], env=env, start_new_session=True
        )
        try:
            status = process.wait(seconds)
            ending = f"ended with status {status}" if status else ""
        except subprocess.TimeoutExpired:
            ending = f"stopped after {seconds:.0f} s"
        finally:
            _end(process)
        rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [*rows, _failure(name, ending)] if ending else rows


def _end(process: "subprocess.Popen[bytes]") -> None:
    """The part and all that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, 9)
    process.wait()


def _failure(name: str, error: str) -> dict[str, Any]:
    print(f"  {name}: {error}", flush=True)
    return {"what": name, "value": None, "unit": "", "error": error}


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="ultramem gpu-report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--minutes", type=float, default=9, help="for all (default: %(default)s)")
    parser.add_argument(
        "--only", default=",".join(PARTS), help=f"of {','.join(PARTS)} (default: all)"
    )
    options = parser.parse_args(argv)
    if not 0 < options.minutes < 1e6:
        raise UltraMemError(f"--minutes {options.minutes:g}: must be more than 0, 9 is usual.")
    options.only = _named(options.only)
    return options


def _named(words: str) -> list[str]:
    names = words.split(",")
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        raise UltraMemError(f"--only {words}: there is no {unknown[0]}. Parts: {', '.join(PARTS)}.")
    return names


if __name__ == "__main__":
    with exit_on_user_error():
        main()
