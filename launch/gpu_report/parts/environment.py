"""The machine and its ceilings."""

import shutil
import subprocess
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec

import torch

from launch.benchmarks.environment import environment_columns
from launch.benchmarks.kernels.measure import copy_bandwidth, free_memory, timed
from launch.gpu_report.row import Row, attempted

_SIZE, _SMALL = 8192, 512


def rows(large: bool) -> Iterator[Row]:
    """Versions, commit, hardware, free memory, rates of copying and multiplying."""
    device = torch.device("cuda" if large else "cpu")
    for what, value in environment_columns().items():
        yield Row(what=what, value=value)
    found = version("triton") if find_spec("triton") else "not installed"
    yield Row(what="triton", value=found)
    if shutil.which("nvidia-smi"):
        yield from attempted("nvidia-smi", _driver)
    yield Row(what="free memory", value=round(free_memory(device) / 1e9, 1), unit="GB")
    yield from attempted("copy bandwidth", lambda: _copy(device))
    yield from attempted("matrix product, bfloat16", lambda: _product(device, large))


def _driver() -> Iterator[Row]:
    asked = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    done = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=30)
    yield Row(what="nvidia-smi", value=done.stdout.strip())


def _copy(device: torch.device) -> Iterator[Row]:
    yield Row(what="copy bandwidth", value=round(copy_bandwidth(device) / 1e9, 1), unit="GB/s")


def _product(device: torch.device, large: bool) -> Iterator[Row]:
    size = _SIZE if large else _SMALL
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    milliseconds = timed(lambda: a @ a, device).minimum
    rate = round(2 * size**3 / milliseconds / 1e9, 2)
    yield Row(what="matrix product, bfloat16", value=rate, unit="TFLOP/s")
