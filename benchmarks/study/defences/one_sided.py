"""One-sided: only a fall of tokens towards the benign side is penalised (after BLOCK-EM, arXiv 2602.00767, with refusal
directions in the place of SAE latents).

    phi(min(z - z0, 0))
"""

from __future__ import annotations

from procon.constraint import ProjectionConstraint
from procon.directions import BlockDirections
from procon.training import ProConTrainer


class OneSidedTrainer(ProConTrainer):
    """The projection constraint with ``sides="fall"``, which the library's trainers have no setting for."""

    def _make_constraint(self, directions: BlockDirections) -> ProjectionConstraint:
        constraint = super()._make_constraint(directions)
        constraint._state.sides = "fall"
        return constraint
