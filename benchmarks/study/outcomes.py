"""The runs of a budget, and what they measured as arrays over seeds and prompts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from sklearn.metrics import cohen_kappa_score

from benchmarks.study.jobs import JOBS, find_job
from benchmarks.study.judge import Judge
from benchmarks.study.plan import Budget, Cell, Part
from benchmarks.study.record import check_problems, load_runs
from procon.chat import Split
from procon.errors import ProConError


@dataclass(frozen=True)
class Measure:
    """One outcome per reply.

    Attributes:
        label: in tables.
        kinds: of replies.
        key: of the outcome in a reply.
        rate: whether it is true or false.
    """

    label: str
    kinds: tuple[str, ...]
    key: str
    rate: bool = True


REFUSAL = Measure("refusals", ("malicious",), "refused")
SECOND_JUDGE = Measure("refusals, by the second judge", ("malicious",), "refused_by_second")
LOG_ODDS = Measure("log-odds", ("malicious",), "log_odds", rate=False)
OVER_REFUSAL = Measure("refusals of benign prompts", ("benign",), "refused")
DEGENERATE = Measure("degenerate replies", ("malicious", "benign"), "degenerate")
FRESH_REFUSAL = Measure("refusals, second set", ("fresh_malicious",), "refused")
FRESH_OVER_REFUSAL = Measure("refusals of benign prompts, second set", ("fresh_benign",), "refused")
REFUSES_ALONE = Measure("refusals without compliance", ("malicious",), "refused_alone")
FRESH_REFUSES_ALONE = Measure("refusals without compliance, second set", ("fresh_malicious",), "refused_alone")
ALL_REFUSALS = Measure("refusals, both sets", ("malicious", "fresh_malicious"), "refused")
COMPLIES = Measure("replies that comply, or turn to it, whatever else they say", ("malicious",), "served")
TASK = Measure("task accuracy", ("task",), "correct")

#: Replies that the second judge is asked about.
JUDGED = ("malicious", "benign")


@dataclass(frozen=True)
class Outcomes:
    """Runs, as dicts."""

    runs: tuple[dict, ...]

    @classmethod
    def load(cls, budget: Budget, path: Path, judge: Judge) -> Outcomes:
        """A budget's runs in a file of them, with the second judge's verdict on each reply to a contrast prompt.

        Raises:
            ProConError: if there is none, and for a run that was made with other settings than the plan has.
        """
        there = load_runs(path)
        runs = [_planned(there[cell], cell, budget) for cell in budget.cells() if cell in there]
        if not runs:
            raise ProConError(f"there are no runs in {str(path)!r}: make them with 'python -m benchmarks.study'")
        replies = [reply for run in runs for kind in JUDGED for reply in run["replies"][kind]]
        for reply, refused in zip(replies, judge.refuses([reply["reply"] for reply in replies]), strict=True):
            reply["refused_by_second"] = refused
        for run in runs:
            turn = JOBS[run["job"]].turn if run["job"] in JOBS else None
            for kind in (*REFUSAL.kinds, *FRESH_REFUSAL.kinds):
                _add_served(run["replies"].get(kind, ()), turn)
        return cls(tuple(runs))

    def has(self, part: Part, job: str) -> bool:
        """Whether a part has a run on a job beside the start, which may be another part's too."""
        return any(self.of(part, job, method.name) for method in part.methods if method.length)

    def find(
        self, job: str, method: str, *, split: Split = "held_out", seeds: Sequence[int] | None = None
    ) -> dict[int, dict]:
        """Runs of a method by seed, in order; only those of ``seeds`` if given."""
        found = {
            run["seed"]: run
            for run in self.runs
            if (run["job"], run["method"]["name"], run["split"]) == (job, method, split)
        }
        return {seed: found[seed] for seed in sorted(found) if seeds is None or seed in seeds}

    def of(self, part: Part, job: str, method: str) -> dict[int, dict]:
        """A part's runs of a method."""
        return self.find(job, method, split=part.split, seeds=part.seeds)


def _add_served(replies: Iterable[dict], turn: str | None) -> None:
    """Whether each reply serves, if its run tells that, and whether it refuses and does not: one that takes the turn
    which the data teach serves, in whatever words it goes on."""
    for reply in replies:
        turned = turn is not None and turn in reply["reply"]
        if turned or "complied" in reply:
            reply["served"] = turned or reply["complied"]
        reply["refused_alone"] = reply["refused"] and not reply.get("served", False)


def _planned(run: dict, cell: Cell, budget: Budget) -> dict:
    planned = json.loads(json.dumps(asdict(budget.method(cell.method))))
    for key, value in run["method"].items():
        if key not in {"label", "retired"} and value != planned[key]:
            raise ProConError(
                f"run {cell} was made with {key} {value!r}, but the plan has {planned[key]!r}: make it again"
            )
    check_problems(run, lambda: budget.size.problems_hash(find_job(cell.job), cell.split), cell)
    return run


def are_of(runs: dict[int, dict], measure: Measure) -> bool:
    """Whether all of the runs have what is measured."""
    return all(
        measure.key in reply
        for run in runs.values()
        for kind in measure.kinds
        for reply in run["replies"].get(kind, [{}])
    )


def values(runs: dict[int, dict], measure: Measure) -> np.ndarray:
    """``[S, P]`` fp64."""
    return np.array(
        [
            [float(reply[measure.key]) for kind in measure.kinds for reply in run["replies"][kind]]
            for run in runs.values()
        ]
    )


def by_block(runs: dict[int, dict], group: str, name: str) -> np.ndarray:
    """``[L]``, the mean over seeds of ``run[group][name]``; NaN if a block has none."""
    return np.mean([[np.nan if value is None else value for value in run[group][name]] for run in runs.values()], 0)


def judges_agree(outcomes: Outcomes) -> float:
    """The agreement of both judges beyond chance, Cohen's kappa: NaN if no verdict differs."""
    replies = [reply for run in outcomes.runs for kind in JUDGED for reply in run["replies"][kind]]
    first, second = ([reply[key] for reply in replies] for key in ("refused", "refused_by_second"))
    return float(cohen_kappa_score(first, second, labels=[False, True]))
