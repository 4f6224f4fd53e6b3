"""Lookup-reduce in Triton: one program sums all picks of a token on one block of columns.

Every picked row is read once, in 16-byte pieces, straight into the sums of all groups, which stay
in registers. Addresses are 64-bit: a table may be larger than 2^31 bytes.

The sums are a matrix product: (groups x picks), a pick's score in the row of its group, times
(picks x columns). For tables in half precision tensor cores do it, at no loss: of the sixteen
rows that they want at least, half hold the scores as rounded to the table's dtype, half what the
rounding left (so beside float16 they may be up to twice its largest number). Other tables multiply
and add. Of tables in 8 bits, codes are decoded in registers: scales multiply scores, and what
bfloat16 holds exactly goes to tensor cores.

N table rows, V value dim, W = V/C columns of a core, T tokens, P picks per token, C cores,
E groups.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ultramem_megatron.kernels.quantized import QuantizedRows, format_of
from ultramem_megatron.kernels.triton_decoding import decoded

FEW_PROGRAMS = 128
"""Fewer than this leave most of a GPU idle (an A100 has 108 multiprocessors, an H100 132)."""

FEW_TOKENS = 128
"""With more, programs of one warp would spill registers if they took addresses apart."""

_HALVES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

MOST_GROUPS = 64
"""More would leave the tensor cores' sums no room in the registers."""

IN_FLIGHT = 4096
CODES_IN_FLIGHT = 2048
"""Numbers of rows that a program on tensor cores holds at a time; decoded codes take more room."""

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
    out = scores.new_empty(len(rows), num_groups, table.shape[1], dtype=table.dtype)
    slice_width = table.shape[1] // scores.shape[2]
    pieces = {"scales": table, "of_core": 1, "of_scale": 1, "num_scales": 1, "FORMAT": ""}
    _launch(table, rows, groups, scores, out, slice_width, table.dtype, pieces)
    return out


def pool_quantized(
    table: QuantizedRows,
    rows: Tensor,
    groups: Tensor,
    scores: Tensor,
    num_groups: int,
    dtype: torch.dtype,
) -> Tensor:
    """As `pool` of a table in 8 bits, codes and scales where a table may be; sums in `dtype`.

    Columns with one core and one scale are a slice each.
    """
    codes, scales = table
    width, num_scales = codes.shape[1], scales.shape[1]
    out = scores.new_empty(len(rows), num_groups, width, dtype=dtype)
    of_core, of_scale = width // scores.shape[2], width // num_scales
    slice_width = math.gcd(of_core, of_scale)
    pieces = {
        "scales": scales.contiguous(),
        "of_core": of_core // slice_width,
        "of_scale": of_scale // slice_width,
        "num_scales": num_scales,
        "FORMAT": format_of(codes),
    }
    multiplied = torch.bfloat16 if dtype in _HALVES else torch.float32
    _launch(codes.view(torch.int8), rows, groups, scores, out, slice_width, multiplied, pieces)
    return out


def _launch(
    table: Tensor,
    rows: Tensor,
    groups: Tensor | None,
    scores: Tensor,
    out: Tensor,
    slice_width: int,
    multiplied: torch.dtype,
    pieces: dict[str, Any],
) -> None:
    """Fill out (T, E, V). multiplied: the dtype in which values meet scores."""
    tokens, num_groups, width = out.shape
    if out.numel() == 0:
        return
    slices = width // slice_width
    if multiplied in _HALVES and num_groups <= MOST_GROUPS:
        in_flight = CODES_IN_FLIGHT if pieces["FORMAT"] else IN_FLIGHT
        sizes = tensor_core_sizes(
            tokens * slices, slice_width, rows.shape[1], num_groups, in_flight
        )
    else:
        sizes = block_sizes(tokens * slices, slice_width, num_groups)
    with torch.cuda.device_of(scores):
        pool_kernel[(tokens, slices * triton.cdiv(slice_width, sizes["BLOCK_W"]))](
            table.contiguous(),
            rows.contiguous(),
            rows if groups is None else groups.contiguous(),
            scores.contiguous(),
            out,
            len(table),
            rows.shape[1],
            width,
            slice_width,
            scores.shape[2],
            num_groups,
            PRECISE=precise(table),
            OPERANDS=operands(multiplied),
            ADDRESSES=groups is None,
            **pieces,
            **sizes,
        )


def tensor_core_sizes(
    slices: int, slice_width: int, picks: int, num_groups: int, in_flight: int = IN_FLIGHT
) -> dict[str, Any]:
    """Launch constants for tables in half precision, no tuning at first use.

    slices: T*C of them, each of `slice_width` columns. in_flight: numbers of rows that a program
    holds. About 8 KB of them: best of 226 settings on an H200 at 8,192 tokens of width 1024, 512
    and 64 (84 picks), and of 170 at width 384 (160 picks), C = 2, E = 4.
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
        "BLOCK_P": max(16, min(in_flight // width, triton.next_power_of_2(picks))),
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


def operands(multiplied: torch.dtype) -> tl.constexpr:
    """Dtype of a matrix product's factors: that of the values, but for Triton's interpreter.

    It multiplies bfloat16 as if the bits were integers.
    """
    if multiplied == torch.float64:
        return tl.float64
    if triton.knobs.runtime.interpret or multiplied not in _HALVES:
        return tl.float32
    return _HALVES[multiplied]


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
    scales,
    of_core,
    of_scale,
    num_scales,
    FORMAT: tl.constexpr,
    PRECISE: tl.constexpr,
    TENSOR_CORES: tl.constexpr,
    OPERANDS: tl.constexpr,
    ADDRESSES: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Grid (T, blocks of all slices); see `pool`. of_core, of_scale: slices of each, in 8 bits."""
    token = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(slice_width, BLOCK_W)
    piece = tl.program_id(1) // blocks
    core = piece if FORMAT == "" else piece // of_core
    within = (tl.program_id(1) % blocks) * BLOCK_W + tl.arange(0, BLOCK_W)
    column = piece * slice_width + within
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
        if FORMAT != "":
            value_pw = decoded(value_pw, FORMAT, OPERANDS)
            scale = tl.load(scales + row * num_scales + piece // of_scale, real, 0)
            score *= scale.to(PRECISE)
        member = group[None, :] == (slot_m % GROUPS)[:, None]
        if TENSOR_CORES:
            first_part = score
            if value_pw.dtype == tl.float16:  # infinity would leave NaN for the other part
                first_part = tl.clamp(score, -65504.0, 65504.0, propagate_nan=tl.PropagateNan.ALL)
            rounded = first_part.to(value_pw.dtype).to(PRECISE)
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
