"""Codes of 8 bits as numbers, in registers, in Triton.

Codes come as int8 whatever they stand for: sm_80 has no conversion from e4m3.
"""

import triton
import triton.language as tl

_TO_E4M3 = tl.constexpr(2.0**120)
"""Between a float32 and an e4m3 with the same bits of exponent: biases 127 and 7."""


@triton.jit
def decoded(code, FORMAT: tl.constexpr, NUMBER: tl.constexpr):
    """What int8 codes stand for, in dtype NUMBER, exactly. FORMAT: int8, or fp8 (e4m3)."""
    if FORMAT == "fp8":
        bits = code.to(tl.int32)  # bit 31 is the sign now
        bits = (bits & -2147483648) | ((bits & 0x7F) << 20)
        return (bits.to(tl.float32, bitcast=True) * _TO_E4M3).to(NUMBER)
    return code.to(NUMBER)


@triton.jit
def scales_of(row, column, block, num_scales, ONE_SCALE: tl.constexpr):
    """Where scales of rows lie, for columns; with one a row, the same for all of them."""
    at = row
    if not ONE_SCALE:
        at = row * num_scales + tl.minimum(column // block, num_scales - 1)
    return at
