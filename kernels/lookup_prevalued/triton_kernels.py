"""The lookup behind pre-values in Triton: one program a token reads both rows of each pick once.

Rows come in 16-byte pieces; sums stay in registers. Addresses are 64-bit. Where a row is too wide
for one program, or tokens are too few, columns are cut and each program repeats the other table's
part, which the cache holds.

N rows of both tables, V value dim, W = V/C columns of a core, K pre-value dim, T tokens, P picks
per token, C cores, E groups.
"""

import triton
import triton.language as tl

from ultramem_megatron.kernels.triton_decoding import decoded, scales_of


@triton.jit
def _activated(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        x = tl.maximum(x, 0.0)
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "silu":
        x = x / (1.0 + tl.exp(-x))
    return x


@triton.jit
def pool_kernel(
    table,
    pre_table,
    rows,
    groups,
    scores,
    x,
    out,
    dots,
    picks,
    width,
    slice_width,
    pre_width,
    cores,
    num_groups,
    scales,
    pre_scales,
    block,
    pre_block,
    num_scales,
    pre_num_scales,
    FORMAT: tl.constexpr,
    ONE_SCALE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISE: tl.constexpr,
    GROUPS: tl.constexpr,
    CORES: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Grid (T, blocks of a slice): sums of all picks of a token on these columns of every core.

    Of tables in 8 bits (FORMAT), block and pre_block: columns with a scale in common.
    """
    token = tl.program_id(0).to(tl.int64)
    core_c = tl.arange(0, CORES)
    within_w = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    column_cw = core_c[:, None] * slice_width + within_w[None, :]
    inside_cw = (core_c < cores)[:, None] & (within_w < slice_width)[None, :]
    group_g = tl.arange(0, GROUPS)
    if GROUPS == 1:  # picks are added up when all of them are there
        sums = tl.zeros([BLOCK_P, CORES, BLOCK_W], PRECISE)
    else:
        sums = tl.zeros([GROUPS, CORES, BLOCK_W], PRECISE)
    for first in range(0, picks, BLOCK_P):
        pick_p = first + tl.arange(0, BLOCK_P)
        real_p = pick_p < picks
        at_p = token * picks + pick_p
        row_p = tl.load(rows + at_p, real_p, 0).to(tl.int64)
        dot_p = tl.zeros([BLOCK_P], PRECISE)
        for start in range(0, pre_width, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            x_k = tl.load(x + token * pre_width + k, k < pre_width, 0).to(PRECISE)
            inside_pk = real_p[:, None] & (k < pre_width)[None, :]
            pre_pk = tl.load(pre_table + row_p[:, None] * pre_width + k[None, :], inside_pk, 0)
            if FORMAT != "":
                at = scales_of(row_p[:, None], k[None, :], pre_block, pre_num_scales, ONE_SCALE)
                pre_pk = decoded(pre_pk, FORMAT, PRECISE)
                pre_pk *= tl.load(pre_scales + at, real_p[:, None], 0)
            dot_p += tl.sum(pre_pk.to(PRECISE) * x_k[None, :], 1)
        if tl.program_id(1) == 0:
            tl.store(dots + at_p, dot_p, real_p)
        score_pc = tl.load(
            scores + at_p[:, None] * cores + core_c[None, :],
            real_p[:, None] & (core_c < cores)[None, :],
            0,
        )
        weight_pc = score_pc.to(PRECISE) * _activated(dot_p, ACTIVATION)[:, None]
        value_pcw = tl.load(
            table + row_p[:, None, None] * width + column_cw[None, :, :],
            real_p[:, None, None] & inside_cw[None, :, :],
            0,
        )
        if FORMAT != "":
            column = column_cw[None, :, :]
            at = scales_of(row_p[:, None, None], column, block, num_scales, ONE_SCALE)
            value_pcw = decoded(value_pcw, FORMAT, PRECISE)
            value_pcw *= tl.load(scales + at, real_p[:, None, None], 0)
        value_pcw = value_pcw.to(PRECISE)
        if GROUPS == 1:
            sums += weight_pc[:, :, None] * value_pcw
        else:
            group_p = tl.load(groups + at_p, real_p, 0)
            member_gp = group_p[None, :] == group_g[:, None]
            weight_gpc = tl.where(member_gp[:, :, None], weight_pc[None, :, :], 0)
            sums += tl.sum(weight_gpc[:, :, :, None] * value_pcw[None, :, :, :], 1)
    if GROUPS == 1:
        sums = tl.sum(sums, 0)[None, :, :]
    start_g = (token * num_groups + group_g) * width
    target = out + start_g[:, None, None] + column_cw[None, :, :]
    tl.store(target, sums, (group_g < num_groups)[:, None, None] & inside_cw[None, :, :])


@triton.jit
def backward_kernel(
    grad,
    table,
    pre_table,
    rows,
    groups,
    scores,
    x,
    gates,
    slopes,
    target,
    pre_target,
    score_grad,
    x_grad,
    dot_grad,
    picks,
    width,
    slice_width,
    pre_width,
    cores,
    num_groups,
    ADD_ROWS: tl.constexpr,
    ADD_PRE_ROWS: tl.constexpr,
    PRECISE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Grid (T, blocks of K): gradients of scores, products and inputs; of rows by atomics."""
    token = tl.program_id(0).to(tl.int64)
    leads = tl.program_id(1) == 0  # of the programs that repeat it for a token, one writes
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    x_k = tl.load(x + token * pre_width + k, k < pre_width, 0).to(PRECISE)
    x_grad_pk = tl.zeros([BLOCK_P, BLOCK_K], PRECISE)
    for first in range(0, picks, BLOCK_P):
        pick_p = first + tl.arange(0, BLOCK_P)
        real_p = pick_p < picks
        at_p = token * picks + pick_p
        row_p = tl.load(rows + at_p, real_p, 0).to(tl.int64)
        group_p = tl.load(groups + at_p, real_p, 0)
        gate_p = tl.load(gates + at_p, real_p, 0).to(PRECISE)
        gate_grad_p = tl.zeros([BLOCK_P], PRECISE)
        for core in range(0, cores):
            score_p = tl.load(scores + at_p * cores + core, real_p, 0).to(PRECISE)
            weight_p = score_p * gate_p
            row_start = (row_p * width + core * slice_width)[:, None]
            grad_start = ((token * num_groups + group_p) * width + core * slice_width)[:, None]
            weight_grad_p = tl.zeros([BLOCK_P], PRECISE)
            for start in range(0, slice_width, BLOCK_W):
                column = (start + tl.arange(0, BLOCK_W))[None, :]
                inside = real_p[:, None] & (column < slice_width)
                grad_pw = tl.load(grad + grad_start + column, inside, 0).to(PRECISE)
                value_pw = tl.load(table + row_start + column, inside, 0).to(PRECISE)
                weight_grad_p += tl.sum(grad_pw * value_pw, 1)
                if ADD_ROWS:  # noqa: SIM102  # one is known when it is compiled
                    if leads:
                        row_grad_pw = weight_p[:, None] * grad_pw
                        tl.atomic_add(
                            target + row_start + column, row_grad_pw, inside, sem="relaxed"
                        )
            if leads:
                tl.store(score_grad + at_p * cores + core, weight_grad_p * gate_p, real_p)
            gate_grad_p += weight_grad_p * score_p
        dot_grad_p = gate_grad_p * tl.load(slopes + at_p, real_p, 0).to(PRECISE)
        if leads:
            tl.store(dot_grad + at_p, dot_grad_p, real_p)
        inside = real_p[:, None] & (k < pre_width)[None, :]
        pre_start = row_p[:, None] * pre_width + k[None, :]
        pre_pk = tl.load(pre_table + pre_start, inside, 0).to(PRECISE)
        x_grad_pk += dot_grad_p[:, None] * pre_pk
        if ADD_PRE_ROWS:
            tl.atomic_add(
                pre_target + pre_start, dot_grad_p[:, None] * x_k[None, :], inside, sem="relaxed"
            )
    tl.store(x_grad + token * pre_width + k, tl.sum(x_grad_pk, 0), k < pre_width)
