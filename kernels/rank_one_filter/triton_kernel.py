"""The filter's update in Triton: one program a head, whose summed cores stay in registers."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ultramem_megatron.kernels.small_svd.triton_kernel import in_order, jacobi_sizes, orthogonal


def update(cores: Tensor, u: Tensor, t: Tensor) -> Tensor:
    """Same contract as `update_filter_reference`."""
    assert u.is_contiguous(), "written in place"
    assert t.is_contiguous(), "written in place"
    num_cores, heads, size, _ = cores.shape
    values = torch.empty_like(u)
    with torch.cuda.device_of(cores):
        filter_kernel[(heads,)](
            cores.contiguous(),
            u,
            t,
            values,
            heads * size * size,
            CORES=num_cores,
            **jacobi_sizes(size),
        )
    return values


@triton.jit
def filter_kernel(
    cores,
    u,
    t,
    values,
    next_core,
    CORES: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    SWEEPS: tl.constexpr,
):
    """Grid (heads). u, t, values (H, R); cores (C, H, R, R), each `next_core` numbers apart."""
    head = tl.program_id(0)
    row, column = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    inside = (row < SIZE) & (column < SIZE)
    at = cores + head * SIZE * SIZE + row * SIZE + column
    total = tl.zeros([BLOCK, BLOCK], values.dtype.element_ty)
    for core in tl.static_range(CORES):
        total += tl.load(at + core * next_core, inside, 0).to(total.dtype)
    turned, turns = orthogonal(total.to(tl.float64), SIZE, BLOCK, SWEEPS)
    length, place = in_order(turned, SIZE, BLOCK)
    number = tl.arange(0, BLOCK)
    real = number < SIZE
    tl.store(values + head * SIZE + place, length, real)
    leading = ((place == 0) & real)[None, :]
    longest = tl.sum(tl.where(leading, length[None, :], 0), 1)
    new_u = tl.sum(tl.where(leading, turned, 0), 1) / tl.where(longest == 0, 1, longest)
    new_t = tl.sum(tl.where(leading, turns, 0), 1)
    # Compared as they are kept, so that a repeated update changes nothing.
    new_u, new_t = new_u.to(total.dtype), new_t.to(total.dtype)
    old_u = tl.load(u + head * SIZE + number, real, 0)
    old_t = tl.load(t + head * SIZE + number, real, 0)
    kept = tl.sum(tl.where(real, tl.abs(new_u - old_u) + tl.abs(new_t - old_t), 0))
    flipped = tl.sum(tl.where(real, tl.abs(new_u + old_u) + tl.abs(new_t + old_t), 0))
    sign = tl.where(flipped < kept, -1, 1).to(total.dtype)
    tl.store(u + head * SIZE + number, sign * new_u, real)
    tl.store(t + head * SIZE + number, sign * new_t, real)
