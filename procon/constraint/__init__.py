"""The projection constraint on a model's block inputs, in any loop.

In: directions, a model to attach to, anchors and a mask for each forward.
Out: the penalty, whose gradient goes into the hidden states.
May import: ``directions``, ``models``, ``ops`` and the leaves.
"""

from procon.errors import require_extra

__extra__ = require_extra("train", __name__)

from procon.constraint.blocks import select_blocks
from procon.constraint.constraint import ProjectionConstraint
from procon.constraint.target import constrained_tokens

__all__ = ["ProjectionConstraint", "constrained_tokens", "select_blocks"]
