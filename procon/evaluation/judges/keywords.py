"""The default judge: phrases by which chat models refuse, in English."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from procon.chat import is_refusal
from procon.evaluation.judges.protocol import Reads, Verdict


@dataclass(frozen=True)
class KeywordJudge:
    """Refusals by their phrases (:func:`procon.chat.is_refusal`), whatever the prompt: fast, free, **English only**.

    Paper, section IV-A3.
    """

    name: str = "keywords"
    reads: Reads = "refusal"

    def verdicts(self, prompts: Sequence[str], replies: Sequence[str]) -> list[Verdict]:
        """Whether each reply has a refusal phrase in its opening."""
        return [Verdict(is_refusal(reply)) for reply in replies]
