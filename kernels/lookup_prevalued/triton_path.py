"""Launches the Triton kernels of the lookup behind pre-values. Letters as in triton_kernels.py."""

from typing import Any

import torch
import triton
from torch import Tensor

from ultramem_megatron.kernels.lookup_prevalued.contract import Gradients, Picks
from ultramem_megatron.kernels.lookup_prevalued.triton_kernels import backward_kernel, pool_kernel
from ultramem_megatron.kernels.lookup_reduce.triton_backward import (
    add_sorted_rows,
    may_add_in_any_order,
    sorted_picks,
)
from ultramem_megatron.kernels.lookup_reduce.triton_forward import FEW_PROGRAMS, precise
from ultramem_megatron.kernels.quantized import QuantizedRows, format_of

MOST_COLUMNS = 2048
"""Of one row that a program takes."""


def in_flight(capability: int) -> int:
    """Numbers of rows that a program holds at a time: 32 for each of 128 threads.

    Half of it before sm_90, which adds to memory number by number, with an address for each.
    """
    return 4096 if capability >= 90 else 2048


def forward(picked: Picks, num_groups: int, act: str) -> tuple[Tensor, Tensor]:
    """As `composed.forward`; sums in float32 or better; tables also in pinned host memory."""
    dtype = picked.table.dtype
    out = picked.scores.new_empty(len(picked.rows), num_groups, picked.table.shape[1], dtype=dtype)
    whole = {"scales": picked.table, "pre_scales": picked.pre_table, "FORMAT": ""}
    counts = dict.fromkeys(("block", "pre_block", "num_scales", "pre_num_scales"), 1)
    return out, _pool(picked, out, act, {**whole, **counts, "ONE_SCALE": True})


def forward_quantized(
    tables: tuple[QuantizedRows, QuantizedRows], picked: Picks, out: Tensor, act: str
) -> Tensor:
    """Sums (T, E, V) of tables in 8 bits into `out`, which is returned.

    tables: values and pre-values, in one format; picked: their codes as int8.
    """
    (codes, scales), (_, pre_scales) = tables
    coded = {
        "scales": scales.contiguous(),
        "pre_scales": pre_scales.contiguous(),
        "block": codes.shape[1] // scales.shape[1],
        "pre_block": tables[1].codes.shape[1] // pre_scales.shape[1],
        "num_scales": scales.shape[1],
        "pre_num_scales": pre_scales.shape[1],
        "FORMAT": format_of(codes),
        "ONE_SCALE": scales.shape[1] == pre_scales.shape[1] == 1,
    }
    _pool(picked, out, act, coded)
    return out


def _pool(picked: Picks, out: Tensor, act: str, coded: dict[str, Any]) -> Tensor:
    """Fill out (T, E, V); returns the products (T, P)."""
    table, pre_table, rows, groups, scores, x = (t.contiguous() for t in picked)
    (tokens, num_groups, width), pre_width = out.shape, pre_table.shape[1]
    picks, cores = scores.shape[1:]
    dots = scores.new_empty(rows.shape)
    if out.numel() == 0:
        return dots
    most = _in_flight_of(scores)
    sizes = pool_sizes(tokens, picks, cores, width // cores, pre_width, num_groups, most)
    with torch.cuda.device_of(scores):
        pool_kernel[(tokens, triton.cdiv(width // cores, sizes["BLOCK_W"]))](
            *(table, pre_table, rows, groups, scores, x),
            out,
            dots,
            picks,
            width,
            width // cores,
            pre_width,
            cores,
            num_groups,
            ACTIVATION=act,
            PRECISE=precise(table),
            **coded,
            **sizes,
        )
    return dots


def backward(
    grad: Tensor,
    picked: Picks,
    gates: Tensor,
    slopes: Tensor,
    target: Tensor | None,
    pre_target: Tensor | None,
) -> Gradients:
    """As `composed.backward`; row gradients are summed in order where lookup-reduce does it."""
    table, pre_table, rows, groups, scores, x = (t.contiguous() for t in picked)
    grad, gates, slopes = (t.contiguous() for t in (grad, gates, slopes))
    tokens, picks, cores = scores.shape
    width, pre_width = table.shape[1], pre_table.shape[1]
    found = Gradients(
        torch.empty_like(scores), x.new_zeros(x.shape, dtype=scores.dtype), torch.empty_like(gates)
    )
    if scores.numel() == 0:
        return found
    atomic = all(t is None or may_add_in_any_order(t) for t in (target, pre_target))
    sizes = backward_sizes(picks, width // cores, pre_width, _in_flight_of(table))
    with torch.cuda.device_of(table):
        backward_kernel[(tokens, triton.cdiv(pre_width, sizes["BLOCK_K"]))](
            *(grad, table, pre_table, rows, groups, scores, x, gates, slopes),
            table if target is None else target,
            pre_table if pre_target is None else pre_target,
            *found,
            picks,
            width,
            width // cores,
            pre_width,
            cores,
            grad.shape[1],
            ADD_ROWS=atomic and target is not None,
            ADD_PRE_ROWS=atomic and pre_target is not None,
            PRECISE=precise(table),
            **sizes,
        )
        in_order = None if atomic else sorted_picks(rows)
        if in_order and target is not None:
            add_sorted_rows(grad, in_order, groups, scores * gates.unsqueeze(2), target)
        if in_order and pre_target is not None:
            one_group, factors = torch.zeros_like(rows), found.dots.unsqueeze(2)
            add_sorted_rows(x.unsqueeze(1), in_order, one_group, factors, pre_target)
    return found


def pool_sizes(
    tokens: int,
    picks: int,
    cores: int,
    slice_width: int,
    pre_width: int,
    num_groups: int,
    most: int,
) -> dict[str, int]:
    """Launch constants of `pool_kernel`: sums and rows in flight, at most so many numbers."""
    groups, cores = triton.next_power_of_2(num_groups), triton.next_power_of_2(cores)
    widest = max(16, MOST_COLUMNS // (groups * cores))
    block_w = min(widest, max(16, triton.next_power_of_2(slice_width)))
    if tokens * triton.cdiv(slice_width, block_w) < FEW_PROGRAMS:
        block_w = min(32, block_w)
    block_p = _picks_in_flight(picks, groups * cores * block_w, most)
    block_k = min(triton.next_power_of_2(pre_width), most // block_p)
    return {
        "GROUPS": groups,
        "CORES": cores,
        "BLOCK_P": block_p,
        "BLOCK_W": block_w,
        "BLOCK_K": max(16, block_k),
        "num_warps": 4,
    }


def backward_sizes(picks: int, slice_width: int, pre_width: int, most: int) -> dict[str, int]:
    """Launch constants of `backward_kernel`: the input's gradient stays in registers."""
    block_k = min(MOST_COLUMNS, max(16, triton.next_power_of_2(pre_width)))
    block_p = _picks_in_flight(picks, block_k, most)
    block_w = min(256, most // (2 * block_p), triton.next_power_of_2(slice_width))
    return {"BLOCK_P": block_p, "BLOCK_W": max(16, block_w), "BLOCK_K": block_k, "num_warps": 4}


def _picks_in_flight(picks: int, columns: int, most: int) -> int:
    fitting = max(2, min(16, most // columns))
    return min(fitting, max(2, triton.next_power_of_2(picks)))


def _in_flight_of(table: Tensor) -> int:
    if not table.is_cuda:  # in Triton's interpreter
        return in_flight(90)
    major, minor = torch.cuda.get_device_capability(table.device)
    return in_flight(10 * major + minor)
