"""SPPFT: the blocks that carry safety do not train (Li et al. 2024, "Safety Layers in Aligned Large Language Models:
The Key to LLM Security", arXiv 2408.17003, section 4).

    theta_l <- theta_l - eta * grad_l    for the blocks l outside of [first, last]; those inside stay as they are

The paper finds the safety layers in the first half, about blocks 6 to 12 of 32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.study.defences.trainer import DefenceTrainer
from procon.models import find_decoder


class FrozenLayersTrainer(DefenceTrainer):
    """Trains all but a range of blocks, which require no gradient from then on.

    Args:
        blocks: shares of the depth between which blocks are frozen, rounded to one or more whole ones.
    """

    def __init__(self, *args: Any, blocks: Sequence[float] = (0.2, 0.4), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        found = find_decoder(self.model).blocks
        first, last = (round(share * len(found)) for share in blocks)
        for block in found[first : max(last, first + 1)]:
            block.requires_grad_(False)
