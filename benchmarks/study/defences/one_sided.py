"""One-sided: only a fall of tokens towards the benign side is penalised (after BLOCK-EM, arXiv 2602.00767, with refusal
directions in the place of SAE latents).

    phi(min(z - z0, 0))
"""

from __future__ import annotations

from typing import Any

from procon.training import ProConTrainer


class OneSidedTrainer(ProConTrainer):
    """The projection constraint with ``sides="fall"``, which the library's trainers have no setting for."""

    def constrain(self, *args: Any, **kwargs: Any) -> None:
        super().constrain(*args, **kwargs)
        if self.procon.constraint is not None:
            self.procon.constraint._state.sides = "fall"
