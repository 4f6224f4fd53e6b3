"""What `ultramem gpu-report` runs, part by part; its flags are in tools/gpu_report.py."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

from launch.gpu_report import page
from ultramem_megatron.errors import UltraMemError, exit_on_user_error
from ultramem_megatron.faults.results_folder import results_folder
from ultramem_megatron.faults.unseen_gpus import refuse_unseen_gpus
from ultramem_megatron.tools.gpu_report import AUTHORS, PARTS, parse

_ROOT = Path(__file__).parents[2]
_FOLDER = "launch.gpu_report.parts"
_POLL_SECONDS = 1.0


def main(argv: Sequence[str] | None = None) -> None:
    """Run the parts. Raises UltraMemError."""
    options = parse(argv)
    refuse_unseen_gpus()
    import torch

    if torch.__version__ < "2.11":  # torch compares versions, not words
        raise UltraMemError(
            f"torch {torch.__version__} is installed here; the report wants 2.11 or newer, and the "
            f"Triton that comes with it."
        )
    large = torch.cuda.is_available()
    if not large:
        print("There is no NVIDIA GPU here: small shapes on the CPU, which say that all runs.")
    if options.authors:
        os.environ[AUTHORS] = str(options.authors.resolve())
    parts = {f"{_FOLDER}.{name}": PARTS[name] for name in options.only}
    run_parts(options.out, parts, options.minutes, large)
    print(f"{options.out / 'report.md'} and report.json")


def run_parts(folder: Path, parts: dict[str, float], minutes: float, large: bool) -> None:
    """Each module of `parts` in turn, with its minutes; all in `minutes`.

    The report is written while they run. On Ctrl-C and SIGTERM the part ends, too: SystemExit.
    """
    results_folder(folder)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    end = time.monotonic() + 60 * minutes
    found: dict[str, list[dict[str, Any]]] = {}
    for module, limit in parts.items():
        name = module.rpartition(".")[2]
        print(f"{name}:", flush=True)
        seconds = min(60 * limit, end - time.monotonic())
        if seconds <= 1:
            found[name] = [_failure(name, f"not begun: --minutes {minutes:g} are over")]
            page.write(folder, found)
            continue
        found[name] = []
        try:
            with contextlib.closing(_rows_of(module, seconds, large)) as running:
                for rows in running:
                    found[name] = rows
                    page.write(folder, found)
        except KeyboardInterrupt:
            found[name] = [*found[name], _failure(name, "ended from outside")]
            page.write(folder, found)
            raise SystemExit(130) from None


def _rows_of(module: str, seconds: float, large: bool) -> Generator[list[dict[str, Any]]]:
    """The rows of a part so far, now and then; at last how it ended, if that was not of itself."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "rows"
        file.touch()
        process = _started(module, file, large)
        end, status = time.monotonic() + seconds, None
        try:
            while status is None and time.monotonic() < end:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    status = process.wait(_POLL_SECONDS)
                yield _written(file)
        finally:
            _end(process)
        ending = (
            f"stopped after {seconds:.0f} s" if status is None else f"ended with status {status}"
        )
        if status != 0:
            yield [*_written(file), _failure(module.rpartition(".")[2], ending)]


def _started(module: str, file: Path, large: bool) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "launch.gpu_report.run_part", module, str(file)]
    threads = {} if large else {"OMP_NUM_THREADS": "1"}
    env = {**os.environ, **threads, "PYTHONPATH": str(_ROOT)}
    return subprocess.Popen(
        [*command, *(["--large"] if large else [])], env=env, start_new_session=True
    )


def _written(file: Path) -> list[dict[str, Any]]:
    """Without a line that is being written."""
    text = file.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


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
