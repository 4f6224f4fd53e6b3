"""What `ultramem gpu-report` runs, part by part; its flags are in tools/gpu_report.py."""

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
from ultramem_megatron.errors import exit_on_user_error
from ultramem_megatron.faults.results_folder import results_folder
from ultramem_megatron.faults.unseen_gpus import refuse_unseen_gpus
from ultramem_megatron.tools.gpu_report import AUTHORS, PARTS, parse

_ROOT = Path(__file__).parents[2]
_FOLDER = "launch.gpu_report.parts"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the parts. Raises UltraMemError."""
    options = parse(argv)
    refuse_unseen_gpus()
    import torch

    large = torch.cuda.is_available()
    if not large:
        print("There is no NVIDIA GPU here: small shapes on the CPU, which say that all runs.")
    if options.authors:
        os.environ[AUTHORS] = str(options.authors.resolve())
    parts = {f"{_FOLDER}.{name}": PARTS[name] for name in options.only}
    run_parts(options.out, parts, options.minutes, large)
    print(f"{options.out / 'report.md'} and report.json")


def run_parts(folder: Path, parts: dict[str, float], minutes: float, large: bool) -> None:
    """Each module of `parts` in turn, with its minutes; all in `minutes`."""
    results_folder(folder)
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


if __name__ == "__main__":
    with exit_on_user_error():
        main()
