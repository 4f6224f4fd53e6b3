"""The lookup of tables in 8 bits, on the device and in host memory: its errors, and how fast.

Beside `host_tables`, which reads tables in half precision.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from launch.benchmarks.kernels.measure import timed
from launch.benchmarks.kernels.shapes import Shape
from launch.gpu_report.row import Row, attempted
from ultramem_megatron.kernels.lookup_reduce import lookup_quantized, lookup_reduce_reference
from ultramem_megatron.kernels.quantized import FORMATS, QuantizedRows, quantized

_LARGE = Shape(num_keys=1024, topk=42, value_dim=1024, dtype=torch.bfloat16)  # 1.1 GB of codes
_TINY = Shape(num_keys=40, topk=6, value_dim=16, dtype=torch.bfloat16)
_TOKENS = (1, 64, 8192)
_COMPARED = 64
"""Tokens whose sums are compared: the reference stores what it gathers."""


def rows(large: bool) -> Iterator[Row]:
    """Relative errors against decoded values, microseconds, and GB/s of codes and scales."""
    device = torch.device("cuda" if large else "cpu")
    for kind in FORMATS:
        yield from attempted(f"lookup of {kind} codes", partial(_of_kind, kind, large, device))


def _of_kind(kind: str, large: bool, device: torch.device) -> Iterator[Row]:
    shape = _LARGE if large else _TINY
    numbers = quantized(torch.randn(shape.num_keys, shape.value_dim, device=device), kind)
    codes = numbers.codes.view(torch.uint8).repeat(shape.num_keys, 1).view(FORMATS[kind])
    table = QuantizedRows(codes, numbers.scales.repeat(shape.num_keys, 1))
    yield _error(kind, table, shape, device)
    yield from _times(f"lookup of {kind} codes", table, shape, device, large)
    if large:
        codes, scales = (part.cpu().pin_memory() for part in (codes.view(torch.uint8), table[1]))
        table = QuantizedRows(codes.view(FORMATS[kind]), scales)
    yield from _times(f"lookup of {kind} codes in host memory", table, shape, device, large)


def _error(kind: str, table: QuantizedRows, shape: Shape, device: torch.device) -> Row:
    picked = _picked(shape, _COMPARED, device)
    found = _read(table, *picked, shape.expansion)
    distinct, places = picked[0].unique(return_inverse=True)
    exact = table.at(distinct).double()
    wanted = lookup_reduce_reference(exact, places, picked[1], picked[2].double(), shape.expansion)
    error = (found.double() - wanted).norm() / wanted.norm()
    return Row(what=f"lookup of {kind} codes, bfloat16", value=float(error), unit="relative error")


def _times(
    what: str, table: QuantizedRows, shape: Shape, device: torch.device, large: bool
) -> Iterator[Row]:
    for tokens in _TOKENS if large else (16,):
        step = partial(_read, table, *_picked(shape, tokens, device), shape.expansion)
        taken = timed(step, device).median  # ms
        moved = tokens * shape.picks * (shape.value_dim + 4)  # bytes
        yield Row(what=f"{what}, T {tokens}", value=round(1e3 * taken, 1), unit="us")
        rate = round(1e-6 * moved / taken, 1)
        yield Row(what=f"{what}, T {tokens}, rows", value=rate, unit="GB/s")


def _picked(shape: Shape, tokens: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    index = (tokens, shape.picks)
    rows = torch.randint(shape.values, index, device=device)
    groups = torch.randint(shape.expansion, index, device=device)
    return rows, groups, torch.randn(*index, shape.cores, device=device)


@torch.no_grad()
def _read(
    table: QuantizedRows, rows: Tensor, groups: Tensor, scores: Tensor, expansion: int
) -> Tensor:
    return lookup_quantized(table, rows, groups, scores, expansion, torch.bfloat16)
