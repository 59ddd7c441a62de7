"""The fused op of the constraint, with its two backends.

In: hidden states, directions, anchors and token weights, as tensors.
Out: projections, penalties and normed states, with their gradients.
May import: ``eager``, ``kernels`` and the leaves. It knows no models.
"""

from procon.ops.backends import outside_backward
from procon.ops.functional import constrain, project, projection_penalty, rms_norm, rms_norm_constrain

__all__ = ["constrain", "outside_backward", "project", "projection_penalty", "rms_norm", "rms_norm_constrain"]
