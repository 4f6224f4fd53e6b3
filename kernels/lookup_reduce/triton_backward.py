"""Gradients of lookup-reduce in Triton.

One program takes a few picks of a token on one core's columns. It reads each row once, for the dot
product that is the score's gradient, and in the same pass adds the row's own gradient to the buffer
by float32 atomics of 16 bytes. Atomics add in any order, so with deterministic algorithms (or a
buffer in another dtype) rows are sorted instead and every distinct one is summed by one program.

N table rows, V value dim, W = V/C columns of a core, T tokens, P picks per token, C cores,
E groups.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ultramem_megatron.kernels.lookup_reduce.triton_forward import precise

MANY_PROGRAMS = 4096
"""From here on a GPU is busy with programs of sixteen picks."""


def backward(
    grad: Tensor,
    table: Tensor,
    rows: Tensor,
    groups: Tensor,
    scores: Tensor,
    target: Tensor | None,
    with_scores: bool,
) -> Tensor | None:
    """Add the table's gradient to `target` (N, V), if given; return that of the scores, if asked.

    grad: (T, E, V).
    """
    score_grad = torch.empty_like(scores, memory_format=torch.contiguous_format)
    if scores.numel() == 0 or table.shape[1] == 0:
        return score_grad.zero_() if with_scores else None
    grad, rows, groups, scores = (x.contiguous() for x in (grad, rows, groups, scores))
    atomic = target is not None and may_add_in_any_order(target)
    with torch.cuda.device_of(table):
        if with_scores or atomic:
            _picks(grad, table, rows, groups, scores, target if atomic else None, score_grad)
        if target is not None and not atomic:
            add_sorted_rows(grad, sorted_picks(rows), groups, scores, target)
    return score_grad if with_scores else None


def may_add_in_any_order(target: Tensor) -> bool:
    """Whether atomics may add to it: one block, exact enough, and no fixed order is asked for."""
    exact = target.is_contiguous() and target.dtype in (torch.float32, torch.float64)
    return exact and not torch.are_deterministic_algorithms_enabled()


def _picks(
    grad: Tensor,
    table: Tensor,
    rows: Tensor,
    groups: Tensor,
    scores: Tensor,
    target: Tensor | None,
    score_grad: Tensor,
) -> None:
    tokens, picks, cores = scores.shape
    width = table.shape[1]
    sizes = picks_sizes(tokens, picks, cores, width // cores)
    picks_kernel[(tokens, triton.cdiv(picks, sizes["BLOCK_P"]), cores)](
        grad,
        table.contiguous(),
        rows,
        groups,
        scores,
        table if target is None else target,
        score_grad,
        picks,
        width,
        width // cores,
        cores,
        grad.shape[1],
        ADD_ROWS=target is not None,
        PRECISE=precise(table),
        **sizes,
    )


def sorted_picks(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (T, P) in ascending order, and the pick that each is of."""
    row_n, order_n = rows.flatten().sort(stable=True)
    return row_n, order_n


def add_sorted_rows(
    grad: Tensor,
    picks_in_order: tuple[Tensor, Tensor],
    groups: Tensor,
    scores: Tensor,
    target: Tensor,
) -> None:
    """Add row gradients to `target` in a fixed order; picks_in_order: of `sorted_picks`.

    A target that is no block of memory is copied, and copied back.
    """
    tokens, picks, cores = scores.shape
    block = target.contiguous()
    width = target.shape[1]
    sizes = row_sizes(width // cores)
    blocks = cores * triton.cdiv(width // cores, sizes["BLOCK_W"])
    sorted_rows_kernel[(tokens * picks, blocks)](
        grad,
        *picks_in_order,
        groups,
        scores,
        block,
        tokens * picks,
        picks,
        width,
        width // cores,
        cores,
        grad.shape[1],
        PRECISE=precise(grad),
        **sizes,
    )
    if block is not target:
        target.copy_(block)


def picks_sizes(tokens: int, picks: int, cores: int, slice_width: int) -> dict[str, int]:
    """Launch constants of `picks_kernel`.

    Within 0.6 % of the best of 41 settings on an H200 at 8,192 tokens of width 1024 (84 picks), and
    of 26 at width 384 (160 picks), both with C = 2; few tokens are cut finer, as there.
    """
    most = min(128, triton.next_power_of_2(slice_width))
    many = tokens * triton.cdiv(picks, 16) * cores >= MANY_PROGRAMS
    return {"BLOCK_P": 16 if many else 4, "BLOCK_W": most, "num_warps": 2 if many else 1}


def row_sizes(slice_width: int) -> dict[str, int]:
    """Launch constants of `sorted_rows_kernel`: one warp, a few rows in flight."""
    return {"BLOCK_P": 4, "BLOCK_W": min(256, triton.next_power_of_2(slice_width)), "num_warps": 1}


@triton.jit
def picks_kernel(
    grad,
    table,
    rows,
    groups,
    scores,
    target,
    score_grad,
    picks,
    width,
    slice_width,
    cores,
    num_groups,
    ADD_ROWS: tl.constexpr,
    PRECISE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Grid (T, blocks of picks, C): score gradients, and row gradients by atomics."""
    token = tl.program_id(0).to(tl.int64)
    pick = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    core = tl.program_id(2)
    real = pick < picks
    at = token * picks + pick
    row = tl.load(rows + at, real, 0).to(tl.int64)
    group = tl.load(groups + at, real, 0)
    score = tl.load(scores + at * cores + core, real, 0).to(PRECISE)
    row_start = (row * width + core * slice_width)[:, None]
    grad_start = ((token * num_groups + group) * width + core * slice_width)[:, None]
    dots = tl.zeros([BLOCK_P], PRECISE)
    for first in range(0, slice_width, BLOCK_W):
        column = (first + tl.arange(0, BLOCK_W))[None, :]
        inside = real[:, None] & (column < slice_width)
        grad_pw = tl.load(grad + grad_start + column, inside, 0).to(PRECISE)
        value_pw = tl.load(table + row_start + column, inside, 0).to(PRECISE)
        dots += tl.sum(grad_pw * value_pw, 1)
        if ADD_ROWS:
            tl.atomic_add(
                target + row_start + column, score[:, None] * grad_pw, inside, sem="relaxed"
            )
    tl.store(score_grad + at * cores + core, dots, real)


@triton.jit(do_not_specialize=["count"])
def sorted_rows_kernel(
    grad,
    row_n,
    order_n,
    groups,
    scores,
    target,
    count,
    picks,
    width,
    slice_width,
    cores,
    num_groups,
    PRECISE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Grid (T*P, C * blocks of a slice): the program at the first pick of a row sums it.

    The others end at once, so the number of distinct rows is never asked for.
    """
    start = tl.program_id(0).to(tl.int64)
    row = tl.load(row_n + start)
    before = tl.load(row_n + start - 1, start > 0, -1)
    if row != before:
        blocks = tl.cdiv(slice_width, BLOCK_W)
        core = tl.program_id(1) // blocks
        within = (tl.program_id(1) % blocks) * BLOCK_W + tl.arange(0, BLOCK_W)
        column = core * slice_width + within
        in_slice = within < slice_width
        sum_w = tl.zeros([BLOCK_W], PRECISE)
        more = 1
        while more != 0:
            place = start + tl.arange(0, BLOCK_P)
            same = tl.load(row_n + place, place < count, -1) == row
            at = tl.load(order_n + place, same, 0)
            group = tl.load(groups + at, same, 0)
            score = tl.load(scores + at * cores + core, same, 0).to(PRECISE)
            grad_start = (at // picks * num_groups + group) * width
            address = grad + grad_start[:, None] + column[None, :]
            grad_pw = tl.load(address, same[:, None] & in_slice[None, :], 0).to(PRECISE)
            sum_w += tl.sum(score[:, None] * grad_pw, 0)
            start += BLOCK_P
            more = tl.min(same.to(tl.int32), 0)
        address = target + row * width + column
        tl.store(address, tl.load(address, in_slice, 0).to(PRECISE) + sum_w, in_slice)
