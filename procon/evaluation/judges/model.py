"""A guard, a classifier or a chat model as a judge, in this process."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedTokenizerBase

from procon.chat import continue_texts, generate_replies
from procon.evaluation.judges.formats import Format
from procon.evaluation.judges.protocol import Reads, Verdict


class ModelJudge:
    """Asks a generative model about each reply, greedily.

    It reads what it judges: a reply that addresses its judge can sway it.

    Args:
        format: what is asked, of :data:`procon.evaluation.FORMATS` or of one's own.
        model: as :func:`procon.models.load_model` gives it.
        tokenizer: its tokenizer.
        name: what it is called in tables and files; the format's name if not given.
    """

    def __init__(
        self,
        format: Format,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str | None = None,
        batch_size: int = 8,
        progress: bool = True,
    ) -> None:
        self.format, self.model, self.tokenizer = format, model, tokenizer
        self.name = name or format.name
        self.batch_size, self.progress = batch_size, progress

    @property
    def reads(self) -> Reads:
        """What its format asks for."""
        return self.format.reads

    def verdicts(self, prompts: Sequence[str], replies: Sequence[str]) -> list[Verdict]:
        """What the model says of each reply."""
        ask = self.format
        exchanges = list(zip(prompts, replies, strict=True))
        settings = {
            "max_new_tokens": ask.max_new_tokens,
            "batch_size": self.batch_size,
            "description": f"judge {self.name}",
            "progress": self.progress,
        }
        if ask.chat:
            questions = [ask.messages(*exchange) for exchange in exchanges]
            answers = generate_replies(self.model, self.tokenizer, questions, **settings)
        else:
            texts = [ask.text(*exchange) for exchange in exchanges]
            answers = continue_texts(self.model, self.tokenizer, texts, **settings)
        return [ask.verdict(answer) for answer in answers]
