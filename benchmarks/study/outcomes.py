"""The runs of a folder, and what they measured as arrays over seeds and prompts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from sklearn.metrics import cohen_kappa_score

from benchmarks.study.jobs import JOBS
from benchmarks.study.judge import Judge
from benchmarks.study.plan import Budget, Part
from benchmarks.study.record import Cell, check_problems, check_settings, load_run
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
FRESH_REFUSAL = Measure("refusal of fresh prompts", ("fresh_malicious",), "refused")
FRESH_OVER_REFUSAL = Measure("refusals of fresh benign prompts", ("fresh_benign",), "refused")
REFUSES_ALONE = Measure("refusals without compliance", ("malicious",), "refused_alone")
FRESH_REFUSES_ALONE = Measure("refusals of fresh prompts without compliance", ("fresh_malicious",), "refused_alone")
ALL_REFUSALS = Measure("refusals, fresh prompts too", ("malicious", "fresh_malicious"), "refused")
COMPLIES = Measure("replies that comply, or turn to it, whatever else they say", ("malicious",), "served")
TASK = Measure("task accuracy", ("task",), "correct")

#: Replies that the second judge is asked about.
JUDGED = ("malicious", "benign")


@dataclass(frozen=True)
class Outcomes:
    """Run files, as dicts."""

    runs: tuple[dict, ...]

    @classmethod
    def load(cls, budget: Budget, folder: Path, judge: Judge, command: str = "python -m benchmarks.study") -> Outcomes:
        """A budget's runs that are there, with the second judge's verdict on each reply to a contrast prompt.

        Args:
            command: makes the runs; named if there are none.

        Raises:
            ProConError: if there is none, or for a file that is damaged or was made with other settings.
        """
        cells = {cell.path(folder): cell for cell in budget.cells() if cell.path(folder).is_file()}
        if not cells:
            raise ProConError(f"there are no runs in {str(folder)!r}: make them with {command!r}")
        runs = [_load_planned(path, cell, budget) for path, cell in cells.items()]
        replies = [reply for run in runs for kind in JUDGED for reply in run["replies"][kind]]
        for reply, refused in zip(replies, judge.refuses([reply["reply"] for reply in replies]), strict=True):
            reply["refused_by_second"] = refused
        for run in runs:
            turn = JOBS[run["setting"]].turn if run["setting"] in JOBS else None
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
            if (run["setting"], run["method"]["name"], run["split"]) == (job, method, split)
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


def _load_planned(path: Path, cell: Cell, budget: Budget) -> dict:
    run = check_settings(load_run(path), asdict(budget.method(cell)), path)
    return check_problems(run, lambda: budget.size.problems_hash(budget.job(cell), cell.split), path)


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


def judges_agree(outcomes: Outcomes) -> tuple[int, float]:
    """How many replies both judges saw, and their agreement beyond chance, Cohen's kappa: NaN if no verdict differs."""
    replies = [reply for run in outcomes.runs for kind in JUDGED for reply in run["replies"][kind]]
    first, second = ([reply[key] for reply in replies] for key in ("refused", "refused_by_second"))
    return len(replies), float(cohen_kappa_score(first, second, labels=[False, True]))
