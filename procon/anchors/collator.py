"""The data collator that brings a batch its anchors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from procon.anchors.store import Anchors
from procon.anchors.token_mask import TokenMask


class AnchoredCollator:
    """A data collator that adds anchors to what another one makes; runs in the loader's workers.

    Args:
        collator: any collator that gives ``input_ids`` and ``labels``.
        anchors: an opened store; or what marks the constrained tokens alone, for live anchors. None until there is
            one: batches then pass as they are.
        tokenizer: names samples in errors; the collator's own if not given.

    Raises:
        ProConError: when it is called, as of :meth:`Anchors.annotate`.
    """

    def __init__(
        self,
        collator: Callable[[list[Any]], dict[str, Any]],
        anchors: Anchors | TokenMask | None,
        *,
        tokenizer: Any = None,
    ) -> None:
        self.collator = collator
        self.anchors = anchors
        self.tokenizer = tokenizer

    def __call__(self, features: list[Any]) -> dict[str, Any]:
        batch = dict(self.collator(features))
        if self.anchors is None:
            return batch
        decode = getattr(self.tokenizer or getattr(self.collator, "tokenizer", None), "decode", None)
        return self.anchors.annotate(batch, decode)
