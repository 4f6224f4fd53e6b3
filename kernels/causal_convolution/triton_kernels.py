"""Causal depthwise convolution in Triton, forward and backward.

Letters as in reference.py. A row is one position of one sequence, so a step in time is B rows
(`shift`), and a piece of x has S/L*B of them. "Padded" rows are those of the history and then of
the piece: output row r reads padded rows r, r + B, ..., r + (K-1)*B, tap by tap. Their numbers are
not specialised: in decoding every new one would be compiled for.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows", "shift"])
def forward_kernel(
    x,
    weight,
    history,
    reach,
    mean,
    out,
    partial,
    rows,
    shift,
    channels,
    TAPS: tl.constexpr,
    WITH_HISTORY: tl.constexpr,
    WITH_REACH: tl.constexpr,
    WITH_MEAN: tl.constexpr,
    WITH_SUMS: tl.constexpr,
    PRECISE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid (L * blocks of a piece's rows, blocks of channels); sums of each block's (., D).

    mean (D,) is taken off the result, but not off what is summed.
    """
    blocks = tl.cdiv(rows, BLOCK_R)
    piece = (tl.program_id(0) // blocks).to(tl.int64)
    row = (tl.program_id(0) % blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_channels = channel < channels
    past = (TAPS - 1) * shift  # rows of history
    if WITH_REACH:
        reach_r = tl.load(reach + piece * rows + row, row < rows, 0)
    sum_rd = tl.zeros([BLOCK_R, BLOCK_D], PRECISE)
    for tap in tl.static_range(TAPS):
        source = row + (tap * shift - past)  # in x; below zero in the history
        wanted = row < rows
        if WITH_REACH:
            wanted = wanted & (reach_r >= TAPS - 1 - tap)
        inside = (wanted & (source >= 0))[:, None] & in_channels[None, :]
        start = (piece * rows + source) * channels
        x_rd = tl.load(x + start[:, None] + channel[None, :], inside, 0)
        if WITH_HISTORY:
            before = (wanted & (source < 0))[:, None] & in_channels[None, :]
            start = (piece * past + source + past) * channels
            x_rd += tl.load(history + start[:, None] + channel[None, :], before, 0)
        weight_d = tl.load(weight + channel * TAPS + tap, in_channels, 0)
        sum_rd += x_rd.to(PRECISE) * weight_d.to(PRECISE)[None, :]
    if WITH_SUMS:  # rows beyond the last are zero
        part = partial + tl.program_id(0).to(tl.int64) * channels
        tl.store(part + channel, tl.sum(sum_rd, 0), in_channels)
    if WITH_MEAN:
        sum_rd -= tl.load(mean + channel, in_channels, 0).to(PRECISE)[None, :]
    target = out + ((piece * rows + row) * channels)[:, None] + channel[None, :]
    tl.store(target, sum_rd, (row < rows)[:, None] & in_channels[None, :])


@triton.jit(do_not_specialize=["rows"])
def step_kernel(
    x,
    weight,
    history,
    mean,
    out,
    rows,
    channels,
    WITH_MEAN: tl.constexpr,
    TAPS: tl.constexpr,
    PRECISE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid (blocks of rows, blocks of channels); one position, rows are sequences.

    A program alone reads and writes its rows and channels of the history (K-1, rows, channels).
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (row < rows)[:, None] & (channel < channels)[None, :]
    at = row[:, None] * channels + channel[None, :]
    position = tl.cast(rows, tl.int64) * channels  # from one to the next
    sum_rd = tl.zeros([BLOCK_R, BLOCK_D], PRECISE)
    for tap in tl.static_range(TAPS):
        source = x if tap == TAPS - 1 else history + tap * position
        x_rd = tl.load(source + at, inside, 0)
        if tap > 0:
            tl.store(history + (tap - 1) * position + at, x_rd, inside)
        weight_d = tl.load(weight + channel * TAPS + tap, channel < channels, 0)
        sum_rd += x_rd.to(PRECISE) * weight_d.to(PRECISE)[None, :]
    if WITH_MEAN:
        sum_rd -= tl.load(mean + channel, channel < channels, 0).to(PRECISE)[None, :]
    tl.store(out + at, sum_rd, inside)


@triton.jit(do_not_specialize=["rows", "shift", "parts"])
def backward_kernel(
    grad,
    x,
    weight,
    history,
    reach,
    grad_x,
    grad_history,
    partial,
    rows,
    shift,
    channels,
    parts,
    TILES: tl.constexpr,
    SLOTS: tl.constexpr,
    TAPS: tl.constexpr,
    WITH_HISTORY: tl.constexpr,
    WITH_REACH: tl.constexpr,
    PRECISE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid (L * parts of a piece's padded rows, blocks of channels).

    Every padded row's gradient, and for its part of them the weight's: partial (L * parts, K, D).
    """
    piece = (tl.program_id(0) // parts).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_channels = channel < channels
    past = (TAPS - 1) * shift
    slot = tl.arange(0, SLOTS)
    weight_kd = tl.zeros([SLOTS, BLOCK_D], PRECISE)
    first = (tl.program_id(0) % parts) * TILES * BLOCK_R
    for tile in range(TILES):
        row = first + tile * BLOCK_R + tl.arange(0, BLOCK_R) - past  # in x; below zero: history
        in_x = ((row >= 0) & (row < rows))[:, None] & in_channels[None, :]
        at = ((piece * rows + row) * channels)[:, None] + channel[None, :]
        x_rd = tl.load(x + at, in_x, 0)
        if WITH_HISTORY:
            before = (row < 0)[:, None] & in_channels[None, :]
            at_history = ((piece * past + row + past) * channels)[:, None] + channel[None, :]
            x_rd += tl.load(history + at_history, before, 0)
        sum_rd = tl.zeros([BLOCK_R, BLOCK_D], PRECISE)
        for tap in tl.static_range(TAPS):
            reader = row + past - tap * shift  # the output that reads this row by this tap
            wanted = (reader >= 0) & (reader < rows)
            if WITH_REACH:
                reach_r = tl.load(reach + piece * rows + reader, wanted, 0)
                wanted = wanted & (reach_r >= TAPS - 1 - tap)
            start = (piece * rows + reader) * channels
            inside = wanted[:, None] & in_channels[None, :]
            grad_rd = tl.load(grad + start[:, None] + channel[None, :], inside, 0).to(PRECISE)
            weight_d = tl.load(weight + channel * TAPS + tap, in_channels, 0).to(PRECISE)
            sum_rd += grad_rd * weight_d[None, :]
            of_tap_d = tl.sum(grad_rd * x_rd.to(PRECISE), 0)
            weight_kd += tl.where((slot == tap)[:, None], of_tap_d[None, :], 0)
        tl.store(grad_x + at, sum_rd, in_x)
        if WITH_HISTORY:
            tl.store(grad_history + at_history, sum_rd, before)
    part = tl.program_id(0).to(tl.int64) * TAPS + slot
    target = partial + part[:, None] * channels + channel[None, :]
    tl.store(target, weight_kd, (slot < TAPS)[:, None] & in_channels[None, :])
