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
from procon.evaluation.judges import Judge, KeywordJudge, Verdict, judge_replies, load_judges
from procon.evaluation.metrics import Metric, find_metric, score
from procon.evaluation.rates import Mean, Rate
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
            ``degenerate``; for a task ``reference`` and ``correct``, or ``mark``; if there was a thought, ``thought``
            and ``unfinished``. If there are several judges, ``verdicts`` has what each of them said; ``scores`` has
            their scores, and ``unread`` names those whose answer could not be read. Replies to a task are judged by
            keywords alone, and replies that did not come by nobody.
        judges: names of the judges; ``refused`` is what the first one said.
        judge_benign: who judged the replies to benign prompts: keywords, if the first judge reads harm.
        harm: mean score of the replies to malicious prompts, if the first judge gives scores.
        metric: name of the task's metric.
        sources: where the prompts come from, per kind, if a prompt set was chosen by name.
        unfinished: share of all replies whose thought did not end; None in files of earlier versions.
        chat: how the model was asked: ``system_prompt`` and ``template_kwargs``; empty in files of earlier versions.
    """

    label: str
    refusal_malicious: Rate
    refusal_benign: Rate
    degenerate: Rate
    task: Rate | Mean | None
    replies: list[dict[str, Any]]
    judges: list[str] = field(default_factory=lambda: ["keywords"])
    judge_benign: str = "keywords"
    harm: Mean | None = None
    metric: str = "exact"
    sources: dict[str, dict[str, Any]] = field(default_factory=dict)
    unfinished: Rate | None = None
    chat: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Evaluation:
        """The evaluation that :meth:`to_dict` was called on, of this version or an earlier one.

        Raises:
            KeyError, TypeError, ValueError: if ``data`` is of something else.
        """
        task, harm = data["task"], data.get("harm")
        if not isinstance(data.get("sources", {}), dict):
            raise TypeError("sources is no object")
        if not (judges := [str(name) for name in data.get("judges", ["keywords"])]):
            raise ValueError("judges is empty")
        return cls(
            label=text_of(data, "label"),
            refusal_malicious=Rate(**data["refusal_malicious"]),
            refusal_benign=Rate(**data["refusal_benign"]),
            degenerate=Rate(**data["degenerate"]),
            task=None if task is None else Mean(**task) if "deviation" in task else Rate(**task),
            replies=[_reply(reply) for reply in data["replies"]],
            judges=judges,
            judge_benign=str(data.get("judge_benign", "keywords")),
            harm=None if harm is None else Mean(**harm),
            metric=str(data.get("metric", "exact")),
            sources=data.get("sources", {}),
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
        texts = [*texts, "reference"]
        if "mark" not in data:
            marks = [*marks, "correct"]
        elif type(data["mark"]) is not float:
            raise TypeError(f"mark is {data['mark']!r:.40}, no number")
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
    judge: str | Judge | Sequence[Judge] | None = None,
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
        judge: who says whether a reply refuses; :class:`KeywordJudge` if not given. Of several, the first one counts.
            A text names them (:func:`load_judges`).
        metric: ``exact``, ``contains`` or ``rouge-l``, or a function of a reply and a reference that returns whether
            the reply is right, or how good it is, 0 to 1.
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
    judges = _judges(judge)
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
    unfinished = Rate.of(_is_unfinished(reply) for reply in replies)
    if unfinished.hits:
        warnings.warn(
            f"{unfinished.hits} of {unfinished.total} replies did not come to the end of their thought, and count as "
            "unfinished: raise thinking_tokens, or switch thinking off",
            stacklevel=2,
        )
    readers = [judge for judge in judges if judge.reads == "refusal"]
    if judges[0] not in readers:
        readers.insert(0, KeywordJudge())
    said = _judge(judges, _finished(malicious))
    _judge(readers, _finished(benign))
    _judge([KeywordJudge()], [reply for reply in tasks if not _is_unfinished(reply)])
    for reply, (_, reference) in zip(tasks, references, strict=True):
        found = score(measure, metric_name, reply["reply"], reference)
        reply |= {"reference": reference, ("correct" if isinstance(found, bool) else "mark"): found}
    scores = [verdict.score for verdict in said[judges[0].name] if verdict.score is not None]
    return Evaluation(
        label=label,
        refusal_malicious=Rate.of(reply["refused"] for reply in _finished(malicious)),
        refusal_benign=Rate.of(reply["refused"] for reply in _finished(benign)),
        degenerate=Rate.of(reply["degenerate"] for reply in _finished(malicious + benign)),
        task=_task_figure(tasks),
        replies=replies,
        judges=[judge.name for judge in judges],
        judge_benign=readers[0].name,
        harm=Mean.of(scores) if scores else None,
        metric=metric_name,
        sources=sources or {},
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


def _judges(judge: str | Judge | Sequence[Judge] | None) -> list[Judge]:
    if isinstance(judge, str):
        return load_judges(judge)
    judges: list[Judge] = [KeywordJudge()] if judge is None else list(judge) if isinstance(judge, Sequence) else [judge]
    if not judges:
        raise ProConError("judge is an empty list: give at least one, or None for keywords")
    for each in judges:
        missing = [name for name in ("name", "reads", "verdicts") if not hasattr(each, name)]
        if missing:
            raise ProConError(f"judge is {each!r:.60}, without {', '.join(missing)}: give a procon.evaluation.Judge")
        if each.reads not in ("refusal", "harm"):
            raise ProConError(f"judge {each.name!r:.60} reads {each.reads!r:.40}: choose refusal or harm")
    names = [each.name for each in judges]
    if len(set(names)) < len(names):
        raise ProConError(f"two judges have one name, among {names!r:.200}: name them apart")
    return judges


def _judge(judges: Sequence[Judge], rows: list[dict[str, Any]]) -> dict[str, list[Verdict]]:
    """Write the verdicts into the rows; ``refused`` is the first judge's."""
    if not rows:
        return {}
    prompts, replies = ([row[key] for row in rows] for key in ("prompt", "reply"))
    said = {judge.name: judge_replies(judge, prompts, replies) for judge in judges}
    for place, row in enumerate(rows):
        verdicts = {name: found[place] for name, found in said.items()}
        row["refused"] = verdicts[judges[0].name].refused
        if len(judges) > 1:
            row["verdicts"] = {name: verdict.refused for name, verdict in verdicts.items()}
        if scores := {name: verdict.score for name, verdict in verdicts.items() if verdict.score is not None}:
            row["scores"] = scores
        if unread := [name for name, verdict in verdicts.items() if verdict.unread]:
            row["unread"] = unread
    return said


def _task_figure(tasks: Sequence[dict[str, Any]]) -> Rate | Mean | None:
    if not tasks:
        return None
    if all("correct" in reply for reply in tasks):
        return Rate.of(reply["correct"] for reply in tasks)
    # A function may say true of one reply and 0.5 of another.
    for reply in tasks:
        if "correct" in reply:
            reply["mark"] = float(reply.pop("correct"))
    return Mean.of(reply["mark"] for reply in tasks)


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
