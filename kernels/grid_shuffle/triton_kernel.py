"""The shuffle in Triton: all rounds of an address in registers; the tables stay in the cache."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 512


def shuffle(addresses: Tensor, tables: Tensor) -> Tensor:
    """Same contract as `grid_shuffle_reference`."""
    rounds, side = tables.shape
    given = addresses.contiguous()
    shuffled = torch.empty_like(given)
    count = given.numel()
    if count:
        with torch.cuda.device_of(given):
            shuffle_kernel[(triton.cdiv(count, BLOCK),)](
                given, tables.contiguous(), shuffled, count, side, ROUNDS=rounds, BLOCK=BLOCK
            )
    return shuffled


@triton.jit(do_not_specialize=["count"])
def shuffle_kernel(
    addresses, tables, shuffled, count, side, ROUNDS: tl.constexpr, BLOCK: tl.constexpr
):
    """Grid (blocks of addresses)."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = place < count
    address = tl.load(addresses + place, real, 0)
    row, column = (address // side).to(tl.int32), (address % side).to(tl.int32)
    for index in tl.static_range(0, ROUNDS, 2):
        row = (row + tl.load(tables + index * side + column)) % side
        column = (column + tl.load(tables + (index + 1) * side + row)) % side
    tl.store(shuffled + place, row.to(tl.int64) * side + column, real)
