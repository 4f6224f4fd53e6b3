"""One-sided Jacobi in Triton: one program a matrix, which stays in its registers, in float64.

Columns are turned against each other, pair by pair, until all are orthogonal: A V = U S. One turn
does that for two columns; more need some sweeps over all pairs, of which each squares the error
(Demmel and Veselic, 1992).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_SWEEPS = 10


def decompose(matrices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (..., R, R), S (..., R) and Vh (..., R, R) of (..., R, R), float32 or float64.

    As torch.linalg.svd gives, but a column of U whose singular value is zero is zero, and what
    holds NaN gives NaN.
    """
    size = matrices.shape[-1]
    given = matrices.contiguous()
    left, right = torch.empty_like(given), torch.empty_like(given)
    values = given.new_empty(given.shape[:-1])
    if given.numel():
        with torch.cuda.device_of(given):
            jacobi_kernel[(given.numel() // size**2,)](
                given, left, values, right, **jacobi_sizes(size)
            )
    return left, values, right


def jacobi_sizes(size: int) -> dict[str, int]:
    """Launch constants of a kernel that decomposes a matrix of so many rows in one program."""
    return {
        "SIZE": size,
        "BLOCK": triton.next_power_of_2(size),
        "SWEEPS": _SWEEPS if size > 2 else 2,
        "num_warps": 1,
    }


@triton.jit
def jacobi_kernel(
    given, left, values, right, SIZE: tl.constexpr, BLOCK: tl.constexpr, SWEEPS: tl.constexpr
):
    """Grid (matrices); a column of U whose singular value is zero becomes zero."""
    start = tl.program_id(0) * SIZE * SIZE
    row, column = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    inside = (row < SIZE) & (column < SIZE)
    matrix = tl.load(given + start + row * SIZE + column, inside, 0).to(tl.float64)
    turned, turns = orthogonal(matrix, SIZE, BLOCK, SWEEPS)
    length, place = in_order(turned, SIZE, BLOCK)
    tl.store(values + tl.program_id(0) * SIZE + place, length, tl.arange(0, BLOCK) < SIZE)
    unit = tl.where(length == 0, 1, length)[None, :]
    tl.store(left + start + row * SIZE + place[None, :], turned / unit, inside)
    tl.store(right + start + place[None, :] * SIZE + row, turns, inside)


@triton.jit
def orthogonal(turned, SIZE: tl.constexpr, BLOCK: tl.constexpr, SWEEPS: tl.constexpr):
    """A V = U S of a matrix A in float64, whose columns are orthogonal, and V."""
    row, column = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    turns = (row == column).to(tl.float64)
    for _ in range(SWEEPS):
        for p in tl.static_range(SIZE - 1):
            for q in tl.static_range(p + 1, SIZE):
                one = tl.sum(tl.where(column == p, turned, 0), 1)[:, None]
                other = tl.sum(tl.where(column == q, turned, 0), 1)[:, None]
                product = tl.sum(one * other)
                between = tl.where(product == 0, 1, product)
                zeta = (tl.sum(other * other) - tl.sum(one * one)) / (2 * between)
                tangent = tl.where(zeta < 0, -1, 1) / (tl.abs(zeta) + tl.sqrt(1 + zeta * zeta))
                tangent = tl.where(product == 0, 0, tangent)
                cosine = 1 / tl.sqrt(1 + tangent * tangent)
                sine = cosine * tangent
                turned = _turned(turned, column, p, q, cosine, sine)
                turns = _turned(turns, column, p, q, cosine, sine)
    return turned, turns


@triton.jit
def in_order(turned, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """The length of each column, a singular value, and its place among them, largest first."""
    row, column = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    length = tl.sqrt(tl.sum(turned * turned, 0))
    rank_by = tl.where(length == length, length, float("inf"))  # NaN has a place of its own too
    other = tl.sum(tl.where(row == column, rank_by[None, :], 0), 1)[:, None]
    before = (other > rank_by[None, :]) | ((other == rank_by[None, :]) & (row < column))
    return length, tl.sum((before & (row < SIZE)).to(tl.int32), 0)


@triton.jit
def _turned(x, column, p: tl.constexpr, q: tl.constexpr, cosine, sine):
    """Columns p and q turned against each other."""
    one = tl.sum(tl.where(column == p, x, 0), 1)[:, None]
    other = tl.sum(tl.where(column == q, x, 0), 1)[:, None]
    x = tl.where(column == p, cosine * one - sine * other, x)
    return tl.where(column == q, sine * one + cosine * other, x)
