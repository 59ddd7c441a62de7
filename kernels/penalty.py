"""phi(e) and its slope, as every kernel computes them in registers."""

import triton
import triton.language as tl


@triton.jit
def value_and_slope(e, reach, PENALTY: tl.constexpr):
    """phi(e) and phi'(e); ``reach``, of the shape of ``e``, is that of the rounding, which only "absolute" knows.

    NaN gives NaN, so that whoever looks for it in gradients finds it.
    """
    if PENALTY == "squared":
        value = e * e
        slope = 2 * e
    elif PENALTY == "absolute":
        # The smallest normal number keeps 0 / 0 away.
        slope = e / tl.maximum(tl.maximum(tl.abs(e), reach), 1.1754943508222875e-38)
        value = slope * (e - 0.5 * slope * reach)
    else:
        slope = tl.clamp(e, -1.0, 1.0, propagate_nan=tl.PropagateNan.ALL)
        value = slope * (e - 0.5 * slope)
    return value, slope
