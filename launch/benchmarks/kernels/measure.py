"""Time, memory and bandwidth of a step.

On a CPU time is the process's own, with one thread: other processes do not count in it.
"""

import functools
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

_SECONDS = 1.0
_LEAST, _MOST = 3, 15
_COPY_BYTES = 2**28
_FLUSHED_BYTES = 2**29  # more than any L2 cache holds


class Timing(NamedTuple):
    """Milliseconds of one step, and how many were timed."""

    minimum: float
    median: float
    repeats: int


def timed(step: Callable[[], object], device: torch.device) -> Timing:
    """Time `step` after one run that is not timed; on a GPU each time with nothing in its cache."""
    step()
    taken: list[float] = []
    while len(taken) < _LEAST or (sum(taken) < 1e3 * _SECONDS and len(taken) < _MOST):
        taken.append(once(step, device))
    return Timing(min(taken), statistics.median(taken), len(taken))


def once(step: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of one `step`; on a GPU with nothing in its cache."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        _other_bytes(device).zero_()  # and the host gets ahead of the GPU
        begin.record()
        step()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end))
    start = time.process_time()
    step()
    return 1e3 * (time.process_time() - start)


@functools.cache
def _other_bytes(device: torch.device) -> torch.Tensor:
    return torch.empty(_FLUSHED_BYTES, dtype=torch.uint8, device=device)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second that a large copy reads and writes."""
    source = torch.ones(_COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    return 2 * _COPY_BYTES / (1e-3 * timed(lambda: target.copy_(source), device).minimum)


def extra_memory(step: Callable[[], object], device: torch.device) -> int | None:
    """Bytes at the peak of `step` above what was there; None where that cannot be told."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = _resident("VmRSS")
        step()
        return max(0, _resident("VmHWM") - before)
    except OSError:
        return None


def _resident(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(found[1]) if found else 0


def free_memory(device: torch.device) -> int:
    """Bytes that may still be allocated."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    return 1024 * int(found[1]) if found else 0
