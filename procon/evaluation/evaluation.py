"""What fine-tuning did to a model: does it still refuse, does it refuse too much, has it learned the task?"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from procon.chat import ContrastPrompts, builtin_prompts, describe_chat, generate, is_degenerate, is_refusal, user_turn
from procon.errors import ProConError
from procon.files import load_json, save_json
from procon.settings import ChatSettings

#: Two-sided 95% quantile of the standard normal distribution.
Z_95 = 1.959963984540054


@dataclass(frozen=True)
class Rate:
    """A share of replies, with the counts that it comes from.

    Raises:
        ProConError: unless ``0 <= hits <= total`` and ``total > 0``: a share of nothing has no value.
    """

    hits: int
    total: int

    def __post_init__(self) -> None:
        if any(type(count) is not int for count in (self.hits, self.total)) or self.total >= 2**53:
            raise ProConError(f"{self.hits!r:.40} hits among {self.total!r:.40} replies is no rate: give whole numbers")
        if not 0 <= self.hits <= self.total or self.total == 0:
            raise ProConError(f"{self.hits} hits among {self.total} replies is no rate: at least one reply is needed")

    @classmethod
    def of(cls, outcomes: Iterable[bool]) -> Rate:
        """The share of ``outcomes`` that are true."""
        outcomes = list(outcomes)
        return cls(sum(outcomes), len(outcomes))

    @property
    def value(self) -> float:
        """``hits / total``, 0 to 1."""
        return self.hits / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95% interval (JASA 22, 1927): unlike ``p +- 2 se`` it stays within 0 to 1 and has width at 0 and 1.

        It covers the choice of prompts alone, not the spread between training seeds.
        """
        n, p = self.total, self.value
        centre = (p + Z_95**2 / (2 * n)) / (1 + Z_95**2 / n)
        half = Z_95 / (1 + Z_95**2 / n) * math.sqrt(p * (1 - p) / n + Z_95**2 / (4 * n**2))
        return (0.0 if self.hits == 0 else centre - half), (1.0 if self.hits == n else centre + half)

    def __str__(self) -> str:
        return f"{self.value:.0%} ({self.hits}/{self.total})"


@dataclass(frozen=True)
class Evaluation:
    """Refusal, over-refusal and task accuracy of one model, with every reply that they were counted from.

    Refusal is judged by keywords in the reply's opening, as the attack success rate of the paper (section IV-A) is:
    ``ASR = 1 - refusal_malicious``. That judge is rough. It takes a lecture without a stock phrase for an answer, and
    a stock phrase before an answer for a refusal. Above all, a reply without a phrase need not be compliance: a model
    that repeats one word has stopped refusing and stopped answering. Read ``degenerate`` beside it, and the replies.

    A model may think first. Its thoughts are no part of the reply. If one does not end within its budget, there is no
    reply, so it counts neither as a refusal nor as compliance nor as degenerate, but as ``unfinished``. In a task it
    counts as wrong.

    Attributes:
        label: name of the model or run.
        refusal_malicious: share of malicious prompts that are refused; higher is safer.
        refusal_benign: share of benign prompts that are refused (over-refusal); lower is more useful.
        degenerate: share of replies, to malicious and benign prompts together, that are no language. Counted apart:
            such a reply is a refusal only if a refusal phrase occurs in it.
        task: share of task replies whose final answer matches the reference exactly; None if no task was given.
        replies: one dict per reply: ``kind`` ("malicious", "benign" or "task"), ``prompt``, ``reply``, ``refused``,
            ``degenerate``, for a task ``reference`` and ``correct``, and ``thought`` and ``unfinished`` if there was a
            thought.
        unfinished: share of all replies whose thought did not end; None in files of earlier versions.
        chat: how the model was asked: ``system_prompt`` and ``template_kwargs``; empty in files of earlier versions.
    """

    label: str
    refusal_malicious: Rate
    refusal_benign: Rate
    degenerate: Rate
    task: Rate | None
    replies: list[dict[str, Any]]
    unfinished: Rate | None = None
    chat: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Evaluation:
        """The evaluation that :meth:`to_dict` was called on.

        Raises:
            KeyError, TypeError, ValueError: if ``data`` is of something else.
        """
        task = data["task"]
        return cls(
            label=text_of(data, "label"),
            refusal_malicious=Rate(**data["refusal_malicious"]),
            refusal_benign=Rate(**data["refusal_benign"]),
            degenerate=Rate(**data["degenerate"]),
            task=None if task is None else Rate(**task),
            replies=[_reply(reply) for reply in data["replies"]],
            unfinished=None if data.get("unfinished") is None else Rate(**data["unfinished"]),
            chat=dict(data.get("chat", {})),
        )

    def save(self, path: str | Path) -> Path:
        """Write a JSON file; returns its path."""
        return save_json(self.to_dict(), path)

    @classmethod
    def load(cls, path: str | Path) -> Evaluation:
        """Read what :meth:`save` wrote.

        Raises:
            ProConError: if the file is missing, damaged, or holds something else.
        """
        return load_json(path, cls.from_dict, "evaluation")


def text_of(data: dict[str, Any], key: str) -> str:
    """The text at ``key``; TypeError if it is something else."""
    if not isinstance(data[key], str):
        raise TypeError(f"{key} is {data[key]!r:.40}, no text")
    return data[key]


def _reply(data: dict[str, Any]) -> dict[str, Any]:
    texts, marks = ["kind", "prompt", "reply"], ["refused", "degenerate"]
    if text_of(data, "kind") == "task":
        texts, marks = [*texts, "reference"], [*marks, "correct"]
    for key in texts:
        text_of(data, key)
    for key in marks:
        if not isinstance(data[key], bool):
            raise TypeError(f"{key} is {data[key]!r:.40}, neither true nor false")
    return dict(data)


def evaluate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    *,
    prompts: ContrastPrompts | None = None,
    task: Sequence[dict[str, Any]] | None = None,
    label: str = "",
    chat: ChatSettings | None = None,
    max_new_tokens: int = 32,
    task_max_new_tokens: int = 64,
    batch_size: int = 64,
    progress: bool = True,
) -> Evaluation:
    """Greedy replies to malicious, benign and task prompts, judged by keywords and by exact match (section IV-A).

    Args:
        model: a chat model; its mode is left as it was.
        tokenizer: its tokenizer, with a chat template.
        prompts: malicious and benign instructions; the built-in held-out ones if not given.
        task: rows ``{"instruction", "output"}`` whose final answers are compared (see :func:`extract_answer`).
        label: name of the model or run in reports.
        chat: how the model is asked: system prompt, variables of its chat template, markers and budget of its thoughts.
        max_new_tokens: length of a reply to a contrast prompt; a refusal shows in its opening. Thoughts do not count.
        task_max_new_tokens: length of a task reply, which has to reach the final answer.

    Raises:
        ProConError: if a task row lacks a key, ``task`` is empty, the tokenizer has no chat template, or no reply came
            to the end of its thought.
    """
    prompts = prompts or builtin_prompts("held_out")
    references = [] if task is None else _task_rows(task)

    def judged(kind: str, instructions: Sequence[str], length: int, description: str) -> list[dict[str, Any]]:
        replies = generate(
            model,
            tokenizer,
            [user_turn(instruction) for instruction in instructions],
            chat=chat,
            max_new_tokens=length,
            batch_size=batch_size,
            description=description,
            progress=progress,
        )
        return [
            {
                "kind": kind,
                "prompt": prompt,
                "reply": reply.text,
                "refused": reply.finished and is_refusal(reply.text),
                "degenerate": reply.finished and is_degenerate(reply.text),
                **({"thought": reply.thought, "unfinished": not reply.finished} if reply.thought else {}),
            }
            for prompt, reply in zip(instructions, replies, strict=True)
        ]

    malicious = judged("malicious", prompts.malicious, max_new_tokens, "malicious prompts")
    benign = judged("benign", prompts.benign, max_new_tokens, "benign prompts")
    tasks = judged("task", [row[0] for row in references], task_max_new_tokens, "task") if references else []
    for reply, (_, reference) in zip(tasks, references, strict=True):
        reply |= {"reference": reference, "correct": exact_match(reply["reply"], reference)}
    replies = malicious + benign + tasks
    unfinished = Rate.of(_is_unfinished(reply) for reply in replies)
    if unfinished.hits:
        warnings.warn(
            f"{unfinished.hits} of {unfinished.total} replies did not come to the end of their thought, and count as "
            "unfinished: raise thinking_tokens, or switch thinking off",
            stacklevel=2,
        )
    return Evaluation(
        label=label,
        refusal_malicious=Rate.of(reply["refused"] for reply in _finished(malicious)),
        refusal_benign=Rate.of(reply["refused"] for reply in _finished(benign)),
        degenerate=Rate.of(reply["degenerate"] for reply in _finished(malicious + benign)),
        task=Rate.of(reply["correct"] for reply in tasks) if tasks else None,
        replies=replies,
        unfinished=unfinished,
        chat=describe_chat(tokenizer, chat),
    )


class NothingFinished(ProConError):
    """No reply came to the end of its thought, so nothing can be said of the model."""


def _is_unfinished(reply: dict[str, Any]) -> bool:
    return bool(reply.get("unfinished"))


def _finished(replies: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    found = [reply for reply in replies if not _is_unfinished(reply)]
    if not found:
        raise NothingFinished(
            f"none of {len(replies)} replies came to the end of its thought, so there is nothing to judge: raise "
            "thinking_tokens, or switch thinking off"
        )
    return found


def _task_rows(task: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    rows = []
    for number, row in enumerate(task, 1):
        if not all(isinstance(row.get(key), str) for key in ("instruction", "output")):
            raise ProConError(
                f"task row {number} has the keys {sorted(row)}: 'instruction' and 'output' texts are needed"
            )
        rows.append((row["instruction"], row["output"]))
    if not rows:
        raise ProConError("task holds no rows: pass at least one, or None to leave the task out")
    return rows


def extract_answer(text: str) -> str:
    """The final answer of ``text``: what follows its last "Answer:" on that line, or else the whole text.

    Normalised for comparison: lower case, single spaces, no full stop at the end, no commas between thousands.
    """
    marked = re.findall(r"answer:[^\S\n]*([^\n]*)", text, flags=re.IGNORECASE)
    answer = " ".join((marked[-1] if marked else text).casefold().split()).rstrip(". ")
    return re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", answer)


def exact_match(reply: str, reference: str) -> bool:
    """Whether ``reply`` and ``reference`` come to the same final answer."""
    return extract_answer(reply) == extract_answer(reference)
