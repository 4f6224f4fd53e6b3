"""Sums over parts in Triton: cast, and stored in another order of columns, in one kernel.

PyTorch takes three for the same: a sum, a transpose, a cast. In any dtype the plain form is
`parts.sum(0).view(first, last).t().to(dtype)`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 4096  # numbers that a program of four warps holds
_COLUMNS = 32


def column_sums(parts: Tensor, dtype: torch.dtype, rows: int = 1) -> Tensor:
    """Sums over the first dimension of (N, rows * columns), transposed: (columns, rows) in `dtype`.

    In the precision of `parts`; the same bits each time.
    """
    count, width = parts.shape
    out = torch.empty(width // rows, rows, dtype=dtype, device=parts.device)
    sums_kernel[(triton.cdiv(width, _COLUMNS),)](
        parts, out, count, width, rows, BLOCK_N=_TILE // _COLUMNS, BLOCK_D=_COLUMNS
    )
    return out


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
