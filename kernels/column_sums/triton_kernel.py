"""Sums over parts in Triton: cast, and stored in another order of columns, in one kernel.

PyTorch takes three for the same: a sum, a transpose, a cast. In any dtype the plain form is
`parts.sum(0).view(first, last).t().to(dtype)`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 1024  # numbers that a warp holds
_COLUMNS = 32
_TALL = 2**15
"""From so many numbers of a program on, as of few columns, it has sixteen warps instead of four."""


def column_sums(parts: Tensor, dtype: torch.dtype, rows: int = 1) -> Tensor:
    """Sums over the first dimension of (N, rows * columns), transposed: (columns, rows) in `dtype`.

    In the precision of `parts`; the same bits each time.
    """
    count, width = parts.shape
    out = torch.empty(width // rows, rows, dtype=dtype, device=parts.device)
    sizes = sums_sizes(count, width)
    sums_kernel[(triton.cdiv(width, sizes["BLOCK_D"]),)](parts, out, count, width, rows, **sizes)
    return out


def sums_sizes(count: int, width: int) -> dict[str, int]:
    """Launch constants. A program's rows take turns, of which each waits for memory."""
    columns = min(_COLUMNS, max(4, triton.next_power_of_2(width)))
    warps = 16 if count * columns > _TALL else 4
    return {"BLOCK_N": _TILE * warps // columns, "BLOCK_D": columns, "num_warps": warps}


@triton.jit(do_not_specialize=["count"])
def sums_kernel(parts, out, count, width, rows, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Grid (blocks of columns): number r * (width / rows) + c goes to c * rows + r."""
    number = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = number < width
    sums = column_total(parts, count, width, number, inside, BLOCK_N, BLOCK_D)
    columns = width // rows
    tl.store(out + number % columns * rows + number // columns, sums, inside)


@triton.jit
def column_total(parts, count, width, number, inside, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Sums over `count` rows of (count, width) for the columns `number` (BLOCK_D,)."""
    sums = tl.zeros([BLOCK_N, BLOCK_D], parts.dtype.element_ty)
    for first in range(0, count, BLOCK_N):
        part = first + tl.arange(0, BLOCK_N)
        at = part.to(tl.int64)[:, None] * width + number[None, :]
        sums += tl.load(parts + at, (part < count)[:, None] & inside[None, :], 0)
    return tl.sum(sums, 0)
