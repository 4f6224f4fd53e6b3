"""The shuffle in Triton: all rounds of an address in registers; the tables stay in the cache."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 512


@triton.jit
def shuffled(row, column, tables, side, ROUNDS: tl.constexpr):
    """int32 row and column after ROUNDS rounds of the tables."""
    row, column = row.to(tl.int32), column.to(tl.int32)
    for index in tl.static_range(0, ROUNDS, 2):
        row = (row + tl.load(tables + index * side + column)) % side
        column = (column + tl.load(tables + (index + 1) * side + row)) % side
    return row, column


def shuffle(addresses: Tensor, tables: Tensor) -> Tensor:
    """Same contract as `grid_shuffle_reference`."""
    rounds, side = tables.shape
    given = addresses.contiguous()
    target = torch.empty_like(given)
    count = given.numel()
    if count:
        with torch.cuda.device_of(given):
            shuffle_kernel[(triton.cdiv(count, BLOCK),)](
                given, tables.contiguous(), target, count, side, ROUNDS=rounds, BLOCK=BLOCK
            )
    return target


@triton.jit(do_not_specialize=["count"])
def shuffle_kernel(
    addresses, tables, target, count, side, ROUNDS: tl.constexpr, BLOCK: tl.constexpr
):
    """Grid (blocks of addresses)."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = place < count
    address = tl.load(addresses + place, real, 0)
    row, column = shuffled(address // side, address % side, tables, side, ROUNDS)
    tl.store(target + place, row.to(tl.int64) * side + column, real)
