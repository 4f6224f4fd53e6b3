"""The running mean in Triton: sums of parts taken in, and the mean moved, a kernel each."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ultramem_megatron.kernels.column_sums.triton_kernel import column_total

_CHANNELS = 32
_PARTS = 128


def add_parts(parts: Tensor, sums: Tensor, count: int) -> None:
    """Add the parts (N, D) of the sums of `count` inputs, and that number, to sums (D + 1,)."""
    assert sums.is_contiguous(), "written in place"
    number, channels = parts.shape
    add_parts_kernel[(triton.cdiv(channels, _CHANNELS),)](
        parts, sums, number, channels, count, BLOCK_N=_PARTS, BLOCK_D=_CHANNELS
    )


@triton.jit(do_not_specialize=["number", "count"])
def add_parts_kernel(
    parts, sums, number, channels, count, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Grid (blocks of channels)."""
    channel = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = channel < channels
    total = column_total(parts, number, channels, channel, inside, BLOCK_N, BLOCK_D)
    tl.store(sums + channel, tl.load(sums + channel, inside, 0) + total, inside)
    if tl.program_id(0) == 0:
        tl.store(sums + channels, tl.load(sums + channels) + count)


def moved(mean: Tensor, updates: Tensor, sums: Tensor, momentum: float) -> None:
    """Same contract as `update_mean_reference`."""
    assert all(buffer.is_contiguous() for buffer in (mean, updates, sums)), "written in place"
    with torch.cuda.device_of(mean):
        mean_kernel[(1,)](
            mean, updates, sums, len(mean), MOMENTUM=momentum, BLOCK=1024, num_warps=4
        )


@triton.jit
def mean_kernel(mean, updates, sums, channels, MOMENTUM: tl.constexpr, BLOCK: tl.constexpr):
    """Grid (1): whether all is finite concerns all channels."""
    count = tl.load(sums + channels)
    broken = tl.zeros([BLOCK], tl.int32)
    for first in range(0, channels, BLOCK):
        channel = first + tl.arange(0, BLOCK)
        total = tl.load(sums + channel, channel < channels, 0)
        broken += (total - total != 0).to(tl.int32)
    further = tl.load(updates) + 1
    share = tl.maximum(1 / further, 1 - MOMENTUM)
    good = (count > 0) & (tl.sum(broken) == 0)
    tl.debug_barrier()  # all have read the number of inputs
    for first in range(0, channels, BLOCK):
        channel = first + tl.arange(0, BLOCK)
        inside = channel < channels
        old = tl.load(mean + channel, inside, 0)
        total = tl.load(sums + channel, inside, 0)
        new = old + share * (total / count - old)
        tl.store(mean + channel, tl.where(good, new, old), inside)
        tl.store(sums + channel, tl.zeros([BLOCK], sums.dtype.element_ty), inside)
    tl.store(updates, tl.where(good, further, further - 1))
    tl.store(sums + channels, 0.0)
