"""The m largest of a tile in Triton: bisection on integers that are ordered like the floats.

It halves the range of the floats first, which of scores takes nine rounds where halving that of the
integers takes fifteen (simulated, normal scores): those between zero and small floats are many.

Both top-m kernels first reduce the scores to the maxima of short chunks of neighbours, take the m
best chunks, and then the m best among those. That is exact, ties included: a value that belongs to
the result has fewer than m values before it in (value, lowest index) order, and each chunk before
its own holds at least one of them.
"""

import triton
import triton.language as tl

ABSENT = tl.constexpr(-(2**31))
"""Key of a slot that holds nothing; below that of every number."""

_HIGHEST = tl.constexpr(2**31 - 1)
_FLOAT_ROUNDS = tl.constexpr(16)
"""Then integers are halved, so that no more than 31 rounds follow whatever the floats are."""


@triton.jit
def ordered_keys(x):
    """int32 keys in the order of float32 x: 0 and -0 are equal, NaN is above all."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    keys = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(x == x, keys, _HIGHEST)


@triton.jit
def _flipped(bits):
    """The bits of a float as an ordered key, and back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def larger(one, other):
    """The larger of two floats; NaN if one is."""
    return tl.maximum(one, other, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def mask_of_largest(keys, count):
    """True at the `count` largest of the keys (1D), of equal ones those of lowest index.

    At least `count` of them must not be ABSENT.
    """
    low = tl.min(tl.where(keys == ABSENT, _HIGHEST, keys), 0)
    high = tl.max(keys, 0)
    # At least `count` keys are >= low, fewer are > high; the last of the result lies between.
    number = 0
    while (low < high) & (number < _FLOAT_ROUNDS):
        lower = _flipped(low).to(tl.float32, bitcast=True)
        upper = _flipped(high).to(tl.float32, bitcast=True)
        between = _flipped((0.5 * lower + 0.5 * upper).to(tl.int32, bitcast=True))
        middle = tl.minimum(tl.maximum(between, low + 1), high)  # whatever NaN and infinity give
        low, high = _halved(keys, count, low, middle, high)
        number += 1
    while low < high:
        middle = (low | high) - ((low ^ high) >> 1)  # mean, rounded up, without overflow
        low, high = _halved(keys, count, low, middle, high)
    mask = keys >= low
    if tl.sum(mask.to(tl.int32), 0) != count:  # several keys are as large as the last
        above = keys > low
        level = keys == low
        wanted = count - tl.sum(above.to(tl.int32), 0)
        mask = above | (level & (tl.cumsum(level.to(tl.int32), 0) <= wanted))
    return mask


@triton.jit
def _halved(keys, count, low, middle, high):
    """The part of low..high that the last of the result lies in; low < middle <= high."""
    found = tl.sum((keys >= middle).to(tl.int32), 0)
    high = tl.where(found > count, high, tl.where(found == count, middle, middle - 1))
    return tl.where(found >= count, middle, low), high
