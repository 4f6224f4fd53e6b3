"""Lookup-reduce in Triton: one program sums all picks of a token on one block of columns.

Every picked row is read once, in 16-byte pieces, straight into the sums of all groups, which stay
in registers. Addresses are 64-bit: a table may be larger than 2^31 bytes.

N table rows, V value dim, W = V/C columns of a core, T tokens, P picks per token, C cores,
E groups.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

FEW_PROGRAMS = 128
"""Fewer than this leave most of a GPU idle (an A100 has 108 multiprocessors, an H100 132)."""


def pool(table: Tensor, rows: Tensor, groups: Tensor, scores: Tensor, num_groups: int) -> Tensor:
    """Same contract as `lookup_reduce_reference`, without a graph; sums in float32 or better."""
    tokens, picks, cores = scores.shape
    out = table.new_empty(tokens, num_groups, table.shape[1])
    if out.numel() == 0:
        return out
    slice_width = table.shape[1] // cores
    sizes = block_sizes(slice_width, num_groups)
    if tokens * cores * triton.cdiv(slice_width, sizes["BLOCK_W"]) < FEW_PROGRAMS:
        sizes = few_tokens_block_sizes(slice_width, num_groups)
    with torch.cuda.device_of(table):
        pool_kernel[(tokens, cores * triton.cdiv(slice_width, sizes["BLOCK_W"]))](
            table.contiguous(),
            rows.contiguous(),
            groups.contiguous(),
            scores.contiguous(),
            out,
            picks,
            table.shape[1],
            slice_width,
            cores,
            num_groups,
            PRECISE=precise(table),
            **sizes,
        )
    return out


def block_sizes(slice_width: int, num_groups: int) -> dict[str, int]:
    """Sizes that keep sums and rows in flight in registers; no tuning at first use."""
    groups = triton.next_power_of_2(num_groups)
    width = min(256, max(16, 8192 // groups), triton.next_power_of_2(slice_width))
    return {
        "GROUPS": groups,
        "BLOCK_P": max(2, min(8, 16 // groups)),
        "BLOCK_W": width,
        "num_warps": min(8, max(1, groups * width // 2048)),
    }


def few_tokens_block_sizes(slice_width: int, num_groups: int) -> dict[str, int]:
    """For decoding: narrow columns give a token many programs, which read many rows at a time."""
    groups = triton.next_power_of_2(num_groups)
    return {
        "GROUPS": groups,
        "BLOCK_P": max(2, min(32, 128 // groups)),
        "BLOCK_W": min(32, max(16, triton.next_power_of_2(slice_width))),
        "num_warps": 4,
    }


def precise(table: Tensor) -> tl.constexpr:
    """What sums are kept in."""
    return tl.float64 if table.dtype == torch.float64 else tl.float32


@triton.jit
def pool_kernel(
    table,
    rows,
    groups,
    scores,
    out,
    picks,
    width,
    slice_width,
    cores,
    num_groups,
    PRECISE: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Grid (T, C * blocks of a slice); see `pool`."""
    token = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(slice_width, BLOCK_W)
    core = tl.program_id(1) // blocks
    within = (tl.program_id(1) % blocks) * BLOCK_W + tl.arange(0, BLOCK_W)
    column = core * slice_width + within
    in_slice = within < slice_width
    group_e = tl.arange(0, GROUPS)
    sums_ew = tl.zeros([GROUPS, BLOCK_W], PRECISE)
    for first in range(0, picks, BLOCK_P):
        pick = first + tl.arange(0, BLOCK_P)
        real = pick < picks
        at = token * picks + pick
        row = tl.load(rows + at, real, 0).to(tl.int64)
        group = tl.load(groups + at, real, 0)
        score = tl.load(scores + at * cores + core, real, 0).to(PRECISE)
        address = table + row[:, None] * width + column[None, :]
        value_pw = tl.load(address, real[:, None] & in_slice[None, :], 0).to(PRECISE)
        weighted_pw = score[:, None] * value_pw
        member = group[None, :] == group_e[:, None]
        sums_ew += tl.sum(tl.where(member[:, :, None], weighted_pw[None, :, :], 0), 1)
    target = out + (token * num_groups + group_e[:, None]) * width + column[None, :]
    tl.store(target, sums_ew, (group_e < num_groups)[:, None] & in_slice[None, :])
