"""phi(e) and its slope, as every kernel computes them in registers."""

import triton
import triton.language as tl


@triton.jit
def value_and_slope(e, PENALTY: tl.constexpr):
    """phi(e) and phi'(e)."""
    if PENALTY == "squared":
        value = e * e
        slope = 2 * e
    elif PENALTY == "absolute":
        value = tl.abs(e)
        slope = (e > 0).to(e.dtype) - (e < 0).to(e.dtype)
    else:
        slope = tl.clamp(e, -1.0, 1.0)
        value = slope * (e - 0.5 * slope)
    return value, slope
