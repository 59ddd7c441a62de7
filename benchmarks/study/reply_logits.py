"""Logits of the replies alone: cross-entropy ignores the others, which are a fifth of a step over 49,152 tokens."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from procon.models import transformers_model
from procon.sequences import IGNORE_INDEX

Collator = Callable[[Sequence[Mapping[str, Any]]], Mapping[str, Any]]


def reply_logits(collate: Collator, model: nn.Module) -> Collator:
    """``collate``, whose batches then ask ``model`` for no other logits; as it is if the model cannot choose."""
    if "logits_to_keep" not in inspect.signature(transformers_model(model).forward).parameters:
        return collate

    def collate_and_choose(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        batch = collate(rows)
        targets = batch["labels"][:, 1:]
        kept = (targets != IGNORE_INDEX).any(0).nonzero()[:, 0]
        return {**batch, "logits_to_keep": kept, "shift_labels": targets[:, kept]}

    return collate_and_choose
