"""What a training learned, by its own log and on problems that it did not see."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from benchmarks.preferences.dpo import DPO
from benchmarks.preferences.grpo import GRPO
from benchmarks.study.outcomes import Measure

#: Of each reply to a held-out problem.
REWARD = Measure("reward", ("task",), "reward", rate=False)


@dataclass(frozen=True)
class Progress:
    """What the log has of an algorithm's progress.

    Attributes:
        key: in the log.
        label: in tables and on axes.
    """

    key: str
    label: str

    def curve(self, runs: dict[int, dict]) -> tuple[list[int], np.ndarray]:
        """Steps, and the mean over seeds at each."""
        histories = [run["history"] for run in runs.values()]
        return [row["step"] for row in histories[0]], np.mean([[row[self.key] for row in h] for h in histories], 0)

    def final(self, runs: dict[int, dict], rows: int = 2) -> float:
        """The mean over seeds and the last rows of the log."""
        return float(self.curve(runs)[1][-rows:].mean())


PROGRESS = {
    DPO.name: Progress("rewards/margins", "margin"),
    GRPO.name: Progress("reward", "reward"),
}
