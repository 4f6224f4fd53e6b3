"""Rows of one candidate: its forward, and forward and backward with the memory that takes."""

from collections.abc import Iterator

import torch

from launch.benchmarks.kernels import measure
from launch.benchmarks.kernels.candidate import Candidate

FORWARD, BOTH = "forward", "forward+backward"


def timings(candidate: Candidate, device: torch.device) -> Iterator[dict[str, str | int | float]]:
    """A row a pass; milliseconds and bytes."""
    for passes, step in ((FORWARD, candidate.inference), (BOTH, candidate.training)):
        timing = measure.timed(step, device)
        peak = _peak_of_backward(candidate, device) if passes == BOTH else ""
        yield {
            "candidate": candidate.name,
            "passes": passes,
            "ms_min": round(timing.minimum, 4),
            "ms_median": round(timing.median, 4),
            "repeats": timing.repeats,
            "backward_extra_bytes": peak,
        }


def _peak_of_backward(candidate: Candidate, device: torch.device) -> int | str:
    output = candidate.forced(candidate.forward)
    peak = measure.extra_memory(lambda: candidate.backward_of(output), device)
    candidate.clear()
    return "" if peak is None else peak
