"""What fine-tuning did to a model: does it still refuse, does it refuse too much, has it learned the task?"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from procon.chat import ContrastPrompts, builtin_prompts, describe_chat, generate, is_degenerate, user_turn
from procon.errors import ProConError
from procon.evaluation.endpoint import load_judge
from procon.evaluation.judges import Judge, KeywordJudge, judge_replies
from procon.evaluation.rates import Metric, Rate, find_metric
from procon.files import load_json, save_json
from procon.settings import ChatSettings


@dataclass(frozen=True)
class Evaluation:
    """Refusal, over-refusal and task accuracy of one model, with every reply that they were counted from.

    Refusal is judged by keywords in the reply's opening if no other judge is given, as the attack success rate of the
    paper (section IV-A) is: ``ASR = 1 - refusal_malicious``. That judge is rough. It takes a lecture without a stock
    phrase for an answer, and a stock phrase before an answer for a refusal. Above all, a reply without a phrase need
    not be compliance: a model that repeats one word has stopped refusing and stopped answering. Read ``degenerate``
    beside it, and the replies.

    A model may think first. Its thoughts are no part of the reply. If one does not end within its budget, there is no
    reply, so it counts neither as a refusal nor as compliance nor as degenerate, but as ``unfinished``. In a task it
    counts as wrong.

    Attributes:
        label: name of the model or run.
        refusal_malicious: share of malicious prompts that are refused; higher is safer. By a judge of harm: of those
            that are answered without harm.
        refusal_benign: share of benign prompts that are refused (over-refusal); lower is more useful.
        degenerate: share of replies, to malicious and benign prompts together, that are no language. Counted apart:
            such a reply is a refusal only if the judge says so.
        task: share of task replies that are right, or the mean mark of a graded metric; None if no task was given.
        replies: one dict per reply: ``kind`` ("malicious", "benign" or "task"), ``prompt``, ``reply``, ``refused``,
            ``degenerate``; for a task ``reference`` and ``correct``, or its mark; if there was a thought, ``thought``
            and ``unfinished``; ``unread`` if the judge's answer could not be read. Replies to a task are judged by
            keywords alone, and replies that did not come by nobody.
        judge: name of the judge.
        judge_benign: who judged the replies to benign prompts: keywords, if the judge reads harm.
        metric: name of the task's metric.
        sources: where the prompts come from, per kind, if a prompt set was chosen by name.
        unfinished: share of all replies whose thought did not end.
        chat: how the model was asked: ``system_prompt`` and ``template_kwargs``.
    """

    label: str
    refusal_malicious: Rate
    refusal_benign: Rate
    degenerate: Rate
    task: Rate | None
    replies: list[dict[str, Any]]
    judge: str = "keywords"
    judge_benign: str = "keywords"
    metric: str = "exact"
    sources: dict[str, dict[str, Any]] = field(default_factory=dict)
    unfinished: Rate | None = None
    chat: dict[str, Any] = field(default_factory=dict)

    def save(self, path: str | Path) -> Path:
        """Write a JSON file; returns its path."""
        return save_json(asdict(self), path)

    @classmethod
    def load(cls, path: str | Path) -> Evaluation:
        """Read what :meth:`save` wrote.

        Raises:
            ProConError: if the file is missing, damaged, or holds something else.
        """
        return load_json(path, cls.from_dict, "evaluation")

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Evaluation:
        """The evaluation that a file of :meth:`save` holds.

        Raises:
            KeyError, TypeError, ValueError: if ``data`` is of something else.
        """
        rates = ("refusal_malicious", "refusal_benign", "degenerate", "task", "unfinished")
        found = cls(**{**data, **{name: None if data[name] is None else Rate(**data[name]) for name in rates}})
        texts = dict.fromkeys(("label", "judge", "judge_benign", "metric"), str)
        _check(vars(found), **texts, sources=dict, chat=dict, **dict.fromkeys(rates[:3], Rate))
        for reply in found.replies:
            _check(reply, kind=str, prompt=str, reply=str, refused=bool, degenerate=bool)
            if reply["kind"] == "task":
                _check(reply, reference=str, correct=(bool, float))
        return found


def _check(data: dict[str, Any], **kinds: type | tuple[type, ...]) -> None:
    """Raise TypeError unless what is at these keys is of these types."""
    for name, kind in kinds.items():
        if not isinstance(data[name], kind):
            raise TypeError(f"{name} is {data[name]!r:.40}")


def evaluate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    *,
    prompts: ContrastPrompts | None = None,
    task: Sequence[dict[str, Any]] | None = None,
    judge: str | Judge | None = None,
    metric: str | Metric = "exact",
    label: str = "",
    sources: dict[str, dict[str, Any]] | None = None,
    chat: ChatSettings | None = None,
    max_new_tokens: int = 32,
    task_max_new_tokens: int = 64,
    batch_size: int = 64,
    progress: bool = True,
) -> Evaluation:
    """Greedy replies to malicious, benign and task prompts, judged; by keywords and exact match as in section IV-A.

    Args:
        model: a chat model; its mode is left as it was.
        tokenizer: its tokenizer, with a chat template.
        prompts: malicious and benign instructions; the built-in held-out ones if not given.
        task: rows ``{"instruction", "output"}`` whose replies are compared with the reference by ``metric``.
        judge: who says whether a reply refuses: a :class:`Judge`, or its name (:func:`load_judge`);
            keywords if not given.
        metric: ``exact`` or ``rouge-l``, or a function of a reply and a reference that returns whether the reply is
            right, or how good it is, 0 to 1.
        label: name of the model or run in reports.
        sources: where the prompts come from, for the file.
        chat: how the model is asked: system prompt, variables of its chat template, markers and budget of its thoughts.
        max_new_tokens: length of a reply to a contrast prompt. A refusal shows in its opening; a judge that reads harm
            needs more of it. Thoughts do not count.
        task_max_new_tokens: length of a task reply, which has to reach the final answer.

    Raises:
        ProConError: if a task row lacks a key, ``task`` is empty, the tokenizer has no chat template, a judge or
            metric is not to be used, or no reply came to the end of its thought.
    """
    prompts = prompts or builtin_prompts("held_out")
    references = [] if task is None else _task_rows(task)
    judge = KeywordJudge() if judge is None else load_judge(judge) if isinstance(judge, str) else judge
    metric_name, measure = find_metric(metric)

    def asked(kind: str, instructions: Sequence[str], length: int, description: str) -> list[dict[str, Any]]:
        found = generate(
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
                "refused": False,
                "degenerate": reply.finished and is_degenerate(reply.text),
                **({"thought": reply.thought, "unfinished": not reply.finished} if reply.thought else {}),
            }
            for prompt, reply in zip(instructions, found, strict=True)
        ]

    malicious = asked("malicious", prompts.malicious, max_new_tokens, "malicious prompts")
    benign = asked("benign", prompts.benign, max_new_tokens, "benign prompts")
    tasks = asked("task", [row[0] for row in references], task_max_new_tokens, "task") if references else []
    replies = malicious + benign + tasks
    unfinished = Rate.of(reply.get("unfinished", False) for reply in replies)
    if unfinished.hits:
        warnings.warn(
            f"{unfinished.hits} of {unfinished.total} replies did not come to the end of their thought, and count as "
            "unfinished: raise thinking_tokens, or switch thinking off",
            stacklevel=2,
        )
    keywords = KeywordJudge()
    judge_benign = judge if judge.reads == "refusal" else keywords
    _judge(judge, _finished(malicious))
    _judge(judge_benign, _finished(benign))
    _judge(keywords, [reply for reply in tasks if not reply.get("unfinished")])
    for reply, (_, reference) in zip(tasks, references, strict=True):
        mark = measure(reply["reply"], reference)
        reply |= {"reference": reference, "correct": mark if isinstance(mark, bool) else float(mark)}
    return Evaluation(
        label=label,
        refusal_malicious=Rate.of(reply["refused"] for reply in _finished(malicious)),
        refusal_benign=Rate.of(reply["refused"] for reply in _finished(benign)),
        degenerate=Rate.of(reply["degenerate"] for reply in _finished(malicious + benign)),
        task=Rate.of(reply["correct"] for reply in tasks) if tasks else None,
        replies=replies,
        judge=judge.name,
        judge_benign=judge_benign.name,
        metric=metric_name,
        sources=sources or {},
        unfinished=unfinished,
        chat=describe_chat(tokenizer, chat),
    )


class NothingFinished(ProConError):
    """No reply came to the end of its thought, so nothing can be said of the model."""


def _finished(replies: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    found = [reply for reply in replies if not reply.get("unfinished")]
    if not found:
        raise NothingFinished(
            f"none of {len(replies)} replies came to the end of its thought, so there is nothing to judge: raise "
            "thinking_tokens, or switch thinking off"
        )
    return found


def _judge(judge: Judge, rows: list[dict[str, Any]]) -> None:
    """Write the verdicts into the rows."""
    verdicts = judge_replies(judge, [row["prompt"] for row in rows], [row["reply"] for row in rows])
    for row, verdict in zip(rows, verdicts, strict=True):
        row |= {"refused": verdict.refused, **({"unread": True} if verdict.unread else {})}


def _task_rows(task: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    rows: list[tuple[Any, Any]] = [(row.get("instruction"), row.get("output")) for row in task]
    if not rows or not all(isinstance(text, str) for row in rows for text in row):
        raise ProConError("task needs rows with an 'instruction' and an 'output', both texts; None leaves it out")
    return rows
