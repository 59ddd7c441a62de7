"""Which tokens of a batch are constrained."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from procon.sequences import TokenSequence, check_text_only, split_batch
from procon.settings import DEFAULTS, TokenScope, check_setting


def mask_tokens(batch: Mapping[str, Any], scope: TokenScope) -> tuple[Tensor, list[tuple[TokenSequence, Tensor]]]:
    """The mask of a batch, ``[B, T]`` fp32; and its sequences that have constrained tokens, with those, ``[t]`` bool.

    Raises:
        ProConError: for a batch that is not of text alone.
    """
    check_text_only(batch)
    mask = torch.zeros(batch["input_ids"].shape)
    sequences = []
    for sequence in split_batch(batch):
        chosen = torch.from_numpy(sequence.in_scope(scope))
        if chosen.any():
            mask[sequence.row, sequence.span][chosen] = 1.0
            sequences.append((sequence, chosen))
    return mask, sequences


class TokenMask:
    """Gives a batch its ``constraint_mask`` alone: for anchors that come of a forward on the batch.

    Args:
        scope: which tokens are constrained.
    """

    def __init__(self, scope: TokenScope = DEFAULTS.scope) -> None:
        check_setting("scope", scope)
        self.scope: TokenScope = scope

    def annotate(self, batch: dict[str, Any], describe: Callable[[Sequence[int]], str] | None = None) -> dict[str, Any]:
        """Add ``constraint_mask`` as :meth:`procon.anchors.Anchors.annotate` does."""
        return {**batch, "constraint_mask": mask_tokens(batch, self.scope)[0]}
