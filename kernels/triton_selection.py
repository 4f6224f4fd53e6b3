"""The m largest of a tile in Triton: bisection on integers that are ordered like the floats.

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


@triton.jit
def ordered_keys(x):
    """int32 keys in the order of float32 x: 0 and -0 are equal, NaN is above all."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    keys = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(x == x, keys, _HIGHEST)


@triton.jit
def mask_of_largest(keys, count):
    """True at the `count` largest of the keys (1D), of equal ones those of lowest index.

    At least `count` of them must not be ABSENT.
    """
    low = tl.min(tl.where(keys == ABSENT, _HIGHEST, keys), 0)
    high = tl.max(keys, 0)
    # At least `count` keys are >= low, fewer are > high; the last of the result lies between.
    while low < high:
        middle = (low | high) - ((low ^ high) >> 1)  # mean, rounded up, without overflow
        found = tl.sum((keys >= middle).to(tl.int32), 0)
        low = tl.where(found >= count, middle, low)
        high = tl.where(found > count, high, tl.where(found == count, middle, middle - 1))
    above = keys > low
    level = keys == low
    wanted = count - tl.sum(above.to(tl.int32), 0)
    return above | (level & (tl.cumsum(level.to(tl.int32), 0) <= wanted))
