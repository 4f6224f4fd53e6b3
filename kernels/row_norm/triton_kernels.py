"""Norms of rows in Triton: a program a row forward, some rows one after the other backward.

Where a row lies in the output: see `Layout`. Their number is not specialised.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows", "slots"])
def norm_kernel(
    x,
    gain,
    out,
    rows,
    parts,
    slots,
    sides,
    group_blocks,
    by_group,
    by_side,
    by_part,
    by_block,
    EPS: tl.constexpr,
    CENTRED: tl.constexpr,
    ROW: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (blocks * slots * parts)."""
    program = tl.program_id(0).to(tl.int64)
    part, slot = program % parts, program // parts % slots
    block = program // parts // slots
    number = tl.arange(0, BLOCK)
    inside = number < ROW
    at = x + ((block * rows + slot) * parts + part) * ROW + number
    real = inside & (number * 0 + slot < rows)
    values = tl.load(at, real, 0).to(tl.float32)
    normed, _ = _normed(values, inside, EPS, CENTRED, ROW)
    result = normed * tl.load(gain + number, inside, 0).to(tl.float32)
    start = _start(
        block, slot, part, sides, group_blocks, by_group, by_side, by_part, by_block, WIDTH
    )
    place = start + number // WIDTH * by_part + number % WIDTH
    tl.store(out + place, result, inside)  # zero stays zero


@triton.jit(do_not_specialize=["rows", "slots"])
def norm_backward_kernel(
    grad,
    x,
    gain,
    grad_x,
    partial,
    rows,
    parts,
    slots,
    sides,
    group_blocks,
    by_group,
    by_side,
    by_part,
    by_block,
    TILE: tl.constexpr,
    EPS: tl.constexpr,
    CENTRED: tl.constexpr,
    ROW: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (blocks * tiles of rows * parts); each program's gradient of the gain (., ROW)."""
    program = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(rows, TILE)
    part, tile = program % parts, program // parts % tiles
    block = program // parts // tiles
    number = tl.arange(0, BLOCK)
    inside = number < ROW
    factor = tl.load(gain + number, inside, 0).to(tl.float32)
    grad_gain = tl.zeros([BLOCK], tl.float32)
    piece = number // WIDTH * by_part + number % WIDTH
    for step in range(TILE):
        row = tile * TILE + step
        real = inside & (number * 0 + row < rows)
        at = ((block * rows + row) * parts + part) * ROW + number
        values = tl.load(x + at, real, 0).to(tl.float32)
        start = _start(
            block, row, part, sides, group_blocks, by_group, by_side, by_part, by_block, WIDTH
        )
        grad_row = tl.load(grad + start + piece, real, 0).to(tl.float32)
        normed, scale = _normed(values, inside, EPS, CENTRED, ROW)
        grad_gain += grad_row * normed
        weighted = grad_row * factor
        along = tl.sum(weighted * normed) / ROW
        result = weighted - normed * along
        if CENTRED:
            result -= tl.sum(weighted) / ROW
        tl.store(grad_x + at, result * scale, real)
    tl.store(partial + program * ROW + number, grad_gain, inside)


@triton.jit
def _start(
    block, row, part, sides, group_blocks, by_group, by_side, by_part, by_block, WIDTH: tl.constexpr
):
    """Where the first piece of a row starts in the output."""
    side, number = block % sides, block // sides
    start = number // group_blocks * by_group + number % group_blocks * by_block
    return start + side * by_side + part * by_part + row * WIDTH


@triton.jit
def _normed(values, inside, EPS: tl.constexpr, CENTRED: tl.constexpr, ROW: tl.constexpr):
    """A row without its gain, zero beyond its end, and what it was multiplied by.

    A row of zeros, as those behind the keys, stays one whatever EPS is.
    """
    if CENTRED:
        values = tl.where(inside, values - tl.sum(values) / ROW, 0)
    square = tl.sum(values * values) / ROW + EPS
    scale = 1 / tl.sqrt(tl.where(square == 0, 1, square))
    return values * scale, scale
