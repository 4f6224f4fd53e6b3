"""Lookup-reduce in Triton: one program sums all picks of a token on one block of columns.

Every picked row is read once, in 16-byte pieces, straight into the sums of all groups, which stay
in registers. Addresses are 64-bit: a table may be larger than 2^31 bytes.

The sums are a matrix product: (groups x picks), a pick's score in the row of its group, times
(picks x columns). For tables in half precision tensor cores do it, at no loss: of the sixteen
rows that they want at least, half hold the scores as rounded to the table's dtype, half what the
rounding left. Other tables multiply and add.

N table rows, V value dim, W = V/C columns of a core, T tokens, P picks per token, C cores,
E groups.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

FEW_PROGRAMS = 128
"""Fewer than this leave most of a GPU idle (an A100 has 108 multiprocessors, an H100 132)."""

FEW_TOKENS = 128
"""With more, programs of one warp would spill registers if they took addresses apart."""

_HALVES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

MOST_GROUPS = 64
"""More would leave the tensor cores' sums no room in the registers."""

BUSY_WARPS = 4096
"""About what a GPU's multiprocessors hold at a time; programs get more warps below it."""


def pool(
    table: Tensor, rows: Tensor, groups: Tensor | None, scores: Tensor, num_groups: int
) -> Tensor:
    """Same contract as `lookup_reduce_reference`, without a graph; sums in float32 or better.

    groups: None where `rows` are addresses, group * N + row, below 2^31.

    The table may be in pinned host memory, all else on the GPU. Triton's launcher asks the driver
    for each pointer's address on the device (driver.c: cuPointerGetAttribute,
    CU_POINTER_ATTRIBUTE_DEVICE_POINTER), which pinned memory has, and refuses only what has none.
    """
    tokens, picks, cores = scores.shape
    out = scores.new_empty(tokens, num_groups, table.shape[1], dtype=table.dtype)
    if out.numel() == 0:
        return out
    slice_width = table.shape[1] // cores
    if table.dtype in _HALVES and num_groups <= MOST_GROUPS:
        sizes = tensor_core_sizes(tokens * cores, slice_width, picks, num_groups)
    else:
        sizes = block_sizes(tokens * cores, slice_width, num_groups)
    with torch.cuda.device_of(scores):
        pool_kernel[(tokens, cores * triton.cdiv(slice_width, sizes["BLOCK_W"]))](
            table.contiguous(),
            rows.contiguous(),
            rows if groups is None else groups.contiguous(),
            scores.contiguous(),
            out,
            len(table),
            picks,
            table.shape[1],
            slice_width,
            cores,
            num_groups,
            PRECISE=precise(table),
            OPERANDS=operands(table),
            ADDRESSES=groups is None,
            **sizes,
        )
    return out


def tensor_core_sizes(slices: int, slice_width: int, picks: int, num_groups: int) -> dict[str, Any]:
    """Launch constants for tables in half precision, no tuning at first use.

    slices: T*C of them, each of `slice_width` columns. About 8 KB of rows are in flight for a
    program: best of 226 settings on an H200 at 8,192 tokens of width 1024, 512 and 64 (84 picks),
    and of 170 at width 384 (160 picks), C = 2, E = 4.
    """
    groups = max(8, triton.next_power_of_2(num_groups))
    widest = 128 if slice_width % 128 == 0 else 64
    width = min(widest, max(16, 1024 // groups), max(16, triton.next_power_of_2(slice_width)))
    if slices * triton.cdiv(slice_width, width) < FEW_PROGRAMS:
        width = min(32, width)
    programs = slices * triton.cdiv(slice_width, width)
    fewest = max(1, groups * width // 1024, groups // 32)  # for the registers
    wanted = triton.next_power_of_2(triton.cdiv(BUSY_WARPS, max(1, programs)))
    return {
        "TENSOR_CORES": True,
        "GROUPS": groups,
        "BLOCK_P": max(16, min(4096 // width, triton.next_power_of_2(picks))),
        "BLOCK_W": width,
        "num_warps": max(fewest, min(wanted, width // 8, 8)),
    }


def block_sizes(slices: int, slice_width: int, num_groups: int) -> dict[str, Any]:
    """Launch constants for other tables: sums and rows in flight fit the registers.

    For few tokens, as in decoding, narrow columns give a token many programs, which read many rows
    at a time.
    """
    groups = triton.next_power_of_2(num_groups)
    width = min(256, max(16, 8192 // groups), triton.next_power_of_2(slice_width))
    few = slices * triton.cdiv(slice_width, width) < FEW_PROGRAMS
    if few:
        width = min(32, max(16, triton.next_power_of_2(slice_width)))
    return {
        "TENSOR_CORES": False,
        "GROUPS": groups,
        "BLOCK_P": max(2, min(32, 128 // groups) if few else min(8, 16 // groups)),
        "BLOCK_W": width,
        "num_warps": 4 if few else min(8, max(1, groups * width // 2048)),
    }


def precise(table: Tensor) -> tl.constexpr:
    """What sums are kept in."""
    return tl.float64 if table.dtype == torch.float64 else tl.float32


def operands(table: Tensor) -> tl.constexpr:
    """Dtype of a matrix product's factors: the table's, which Triton's interpreter gets wrong.

    It multiplies bfloat16 as if the bits were integers.
    """
    if triton.knobs.runtime.interpret or table.dtype not in _HALVES:
        return precise(table)
    return _HALVES[table.dtype]


@triton.jit(do_not_specialize=["num_rows"])
def pool_kernel(
    table,
    rows,
    groups,
    scores,
    out,
    num_rows,
    picks,
    width,
    slice_width,
    cores,
    num_groups,
    PRECISE: tl.constexpr,
    TENSOR_CORES: tl.constexpr,
    OPERANDS: tl.constexpr,
    ADDRESSES: tl.constexpr,
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
    PARTS: tl.constexpr = 2 if TENSOR_CORES else 1  # of a score
    slot_m = tl.arange(0, PARTS * GROUPS)
    sums_mw = tl.zeros([PARTS * GROUPS, BLOCK_W], PRECISE)
    for first in range(0, picks, BLOCK_P):
        pick = first + tl.arange(0, BLOCK_P)
        real = pick < picks
        at = token * picks + pick
        row = tl.load(rows + at, real, 0)
        if ADDRESSES:
            row = row.to(tl.int32)
            row, group = row % num_rows, row // num_rows
        else:
            group = tl.load(groups + at, real, 0)
        row = row.to(tl.int64)
        score = tl.load(scores + at * cores + core, real, 0).to(PRECISE)
        address = table + row[:, None] * width + column[None, :]
        value_pw = tl.load(address, real[:, None] & in_slice[None, :], 0)
        member = group[None, :] == (slot_m % GROUPS)[:, None]
        if TENSOR_CORES:
            rounded = score.to(value_pw.dtype).to(PRECISE)
            part = tl.where(
                (slot_m < GROUPS)[:, None], rounded[None, :], (score - rounded)[None, :]
            )
            weight = tl.where(member, part, 0).to(value_pw.dtype)
            sums_mw = tl.dot(weight.to(OPERANDS), value_pw.to(OPERANDS), sums_mw)
        else:
            weight = tl.where(member, score[None, :], 0)
            sums_mw += tl.sum(weight[:, :, None] * value_pw.to(PRECISE)[None, :, :], 1)
    sums_ew = tl.sum(tl.reshape(sums_mw, [PARTS, GROUPS, BLOCK_W]), 0)
    group_e = tl.arange(0, GROUPS)
    target = out + (token * num_groups + group_e[:, None]) * width + column[None, :]
    tl.store(target, sums_ew, (group_e < num_groups)[:, None] & in_slice[None, :])
