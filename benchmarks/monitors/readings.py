"""Run files as readings: how well a monitor separates prompts, and where its threshold has come to lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from benchmarks.monitors.prompts import CONCEPTS
from benchmarks.study.methods import Method
from benchmarks.study.plan import Budget, Part
from benchmarks.study.record import check_settings
from procon.errors import ProConError
from procon.files import load_json

#: Score from which a monitor says yes: yes is then more likely than no.
THRESHOLD = 0.0

#: Of the bootstrap over twins.
DRAWS, SEED = 10_000, 0


@dataclass(frozen=True)
class Reading:
    """Scores of one monitor: twin by twin, of the prompts with its concept and of those without.

    Attributes:
        site: where it reads: a block, or the number of blocks for the output of the last one.
        positive, negative: ``[n]`` fp64.
    """

    site: int
    positive: np.ndarray
    negative: np.ndarray

    @classmethod
    def of(cls, run: dict, concept: str) -> Reading:
        """One concept's in a run."""
        found = run["monitors"][concept]
        return cls(found["site"], np.array(found["positive"]), np.array(found["negative"]))

    @cached_property
    def order(self) -> np.ndarray:
        """``[n, n]``, whether a prompt with the concept scores higher than one without: 1, or 0; half if alike."""
        difference = self.positive[:, None] - self.negative[None]
        return (difference > 0) + 0.5 * (difference == 0)

    @property
    def auroc(self) -> float:
        return float(self.order.mean())

    @property
    def caught(self) -> float:
        return float((self.positive > THRESHOLD).mean())

    @property
    def false_alarms(self) -> float:
        return float((self.negative > THRESHOLD).mean())

    @property
    def accuracy(self) -> float:
        """Share of right answers, with as many prompts of either side."""
        return (self.caught + 1 - self.false_alarms) / 2

    def shifts(self, before: Reading) -> tuple[float, float]:
        """Change of the mean score of either side, in units of the distance between the two before."""
        distance = abs(before.positive.mean() - before.negative.mean())
        pairs = ((self.positive, before.positive), (self.negative, before.negative))
        positive, negative = (float((now.mean() - then.mean()) / distance) for now, then in pairs)
        return positive, negative


@dataclass(frozen=True)
class Loss:
    """How much AUROC a monitor lost, a mean over seeds; ``low`` to ``high`` are 95% for other twins."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, before: Reading, after: Sequence[Reading]) -> Loss:
        """Between one reading of the start and one of each seed, of the same prompts.

        The interval is a bootstrap's: twins are drawn, and both readings have the same ones. It takes the seeds as
        they are.
        """
        order = before.order - np.mean([reading.order for reading in after], 0)
        count = len(order)
        draws = np.random.default_rng(SEED).multinomial(count, np.full(count, 1 / count), size=DRAWS) / count
        losses = ((draws @ order) * draws).sum(1)
        low, high = np.quantile(losses, (0.025, 0.975))
        return cls(float(order.mean()), float(low), float(high))


@dataclass(frozen=True)
class Readings:
    """The runs of a folder, as dicts."""

    runs: tuple[dict, ...]

    @classmethod
    def load(cls, budget: Budget, folder: Path) -> Readings:
        """Those of a budget that are there.

        Raises:
            ProConError: if there is none, for a file that is damaged or was made with other settings, or if they are
                not of the same monitors.
        """
        paths = {cell.path(folder): budget.method(cell) for cell in budget.cells() if cell.path(folder).is_file()}
        if not paths:
            raise ProConError(f"there are no runs in {str(folder)!r}: make them with 'python -m benchmarks.monitors'")
        runs = tuple(_load(path, method) for path, method in paths.items())
        hashes = {run["monitors_hash"] for run in runs}
        if len(hashes) > 1:
            raise ProConError(
                f"runs in {str(folder)!r} are of {len(hashes)} sets of monitors: make them in one working folder"
            )
        return cls(runs)

    def of(self, part: Part, method: Method) -> list[dict]:
        """A method's runs in a part, by seed."""
        found = [
            run
            for run in self.runs
            if run["method"]["name"] == method.name and run["split"] == part.split and run["seed"] in part.seeds
        ]
        return sorted(found, key=lambda run: run["seed"])

    def read(self, part: Part, method: Method, concept: str) -> list[Reading]:
        """What one monitor reads in each of them."""
        return [Reading.of(run, concept) for run in self.of(part, method)]


def _load(path: Path, method: Method) -> dict:
    def build(run: dict) -> dict:
        for concept in CONCEPTS:
            Reading.of(run, concept)
        return {**run, "rates": dict(run["rates"])}

    return check_settings(load_json(path, build, "run"), asdict(method), path)
