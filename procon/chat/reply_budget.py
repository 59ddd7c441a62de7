"""When generation stops if a model thinks: so many tokens of thought, and so many of reply after it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria

from procon.chat.thinking import Markers

#: Tokens that are decoded to look for a marker, more than any has; and how many a marker may take beyond the budgets.
SLACK = 32


@dataclass
class _Row:
    """Of one sequence: whether it thinks, and how many tokens it had when it began or ended to."""

    thinks: bool
    since: int = 0


class ReplyBudget(StoppingCriteria):
    """Ends each sequence by itself, by what it is doing.

    Args:
        opened: for each sequence, whether its prompt ends within a thought.
        width: tokens of the padded prompts.
        reply_tokens, thinking_tokens: how many it may have of either.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        markers: Sequence[Markers],
        opened: Sequence[bool],
        width: int,
        reply_tokens: int,
        thinking_tokens: int,
    ) -> None:
        self.tokenizer, self.markers, self.width = tokenizer, markers, width
        self.budget = {False: reply_tokens, True: thinking_tokens}
        self.rows = [_Row(thinks) for thinks in opened]

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> torch.BoolTensor:
        count = input_ids.shape[1] - self.width
        latest = input_ids[:, self.width :][:, -SLACK:].tolist()
        done = [self._is_done(row, ids, count) for row, ids in zip(self.rows, latest, strict=True)]
        return cast(torch.BoolTensor, torch.tensor(done, device=input_ids.device))

    def _is_done(self, row: _Row, latest: list[int], count: int) -> bool:
        text = str(self.tokenizer.decode(latest[max(0, len(latest) - (count - row.since)) :]))
        if any((each.end if row.thinks else each.start or "\0") in text for each in self.markers):
            row.thinks, row.since = not row.thinks, count
        return count - row.since >= self.budget[row.thinks]
