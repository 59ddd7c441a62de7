"""The projection constraint on a model's block inputs, in any loop.

In: directions, a model to attach to, anchors and a mask for each forward.
Out: the penalty, whose gradient goes into the block inputs.
May import: ``directions``, ``models``, ``ops`` and the leaves.
"""

from procon.constraint.blocks import Blocks, choose_blocks, select_blocks
from procon.constraint.constraint import Fuse, ProjectionConstraint, Units, check_finite, constrained_tokens

__all__ = [
    "Blocks",
    "Fuse",
    "ProjectionConstraint",
    "Units",
    "check_finite",
    "choose_blocks",
    "constrained_tokens",
    "select_blocks",
]
