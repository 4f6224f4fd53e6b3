"""The lookup in tables that stay in pinned host memory, beside what a copy from there reaches.

Each picked row crosses the bus once for each pick: nothing of a table is kept on the GPU.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from launch.benchmarks.kernels.measure import timed
from launch.benchmarks.kernels.shapes import Shape
from launch.gpu_report.row import Row, attempted
from ultramem_megatron.kernels.lookup_reduce import lookup_reduce

_COPIED = 2**28  # bytes
_LARGE = Shape(num_keys=1024, topk=42, value_dim=1024, dtype=torch.bfloat16)  # 2.1 GB
_TINY = Shape(num_keys=40, topk=6, value_dim=16)


def rows(large: bool) -> Iterator[Row]:
    """Microseconds of a forward, GB/s of picked rows, and the same of a copy: the limit."""
    device = torch.device("cuda" if large else "cpu")
    yield from attempted("copy from host memory", partial(_copy, device))
    yield from attempted("lookup in host memory", partial(_lookups, large, device))


def _copy(device: torch.device) -> Iterator[Row]:
    source = _on_host(torch.ones(_COPIED, dtype=torch.uint8), device)
    target = torch.empty(_COPIED, dtype=torch.uint8, device=device)
    taken = timed(lambda: target.copy_(source, non_blocking=True), device).minimum  # ms
    yield Row(what="copy from host memory", value=round(1e-6 * _COPIED / taken, 1), unit="GB/s")


def _lookups(large: bool, device: torch.device) -> Iterator[Row]:
    shape = _LARGE if large else _TINY
    numbers = torch.randn(shape.num_keys, shape.value_dim).to(shape.dtype)
    table = _on_host(numbers.repeat(shape.num_keys, 1), device)
    for tokens in (1, 64, 1024) if large else (16,):
        index = (tokens, shape.picks)
        rows = torch.randint(shape.values, index, device=device)
        groups = torch.randint(shape.expansion, index, device=device)
        scores = torch.randn(tokens, shape.picks, shape.cores, device=device)
        step = partial(_read, table, rows, groups, scores, shape.expansion)
        taken = timed(step, device).median  # ms
        moved = tokens * shape.picks * shape.value_dim * shape.dtype.itemsize  # bytes
        what = f"lookup in host memory, T {tokens}"
        yield Row(what=what, value=round(1e3 * taken, 1), unit="us")
        yield Row(what=f"{what}, rows", value=round(1e-6 * moved / taken, 1), unit="GB/s")


@torch.no_grad()
def _read(table: Tensor, rows: Tensor, groups: Tensor, scores: Tensor, expansion: int) -> Tensor:
    return lookup_reduce(table, rows, groups, scores, expansion)


def _on_host(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.pin_memory() if device.type == "cuda" else tensor
