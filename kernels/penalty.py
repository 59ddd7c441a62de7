"""phi(e) and its slope, as every kernel computes them in registers."""

import triton
import triton.language as tl


@triton.jit
def value_and_slope(e, bound, PENALTY: tl.constexpr):
    """phi(e) and phi'(e); ``bound`` is how much of ``e`` may be rounding, which only "absolute" knows.

    NaN gives NaN, so that whoever looks for it in gradients finds it.
    """
    if PENALTY == "squared":
        value = e * e
        slope = 2 * e
    elif PENALTY == "absolute":
        # The smallest normal number keeps 0 / 0 away.
        slope = e / tl.maximum(tl.maximum(tl.abs(e), bound), 1.1754943508222875e-38)
        value = slope * (e - 0.5 * slope * bound)
    else:
        slope = tl.clamp(e, -1.0, 1.0, propagate_nan=tl.PropagateNan.ALL)
        value = slope * (e - 0.5 * slope)
    return value, slope
