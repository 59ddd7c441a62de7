"""Public tasks of the papers, from the hub: GSM8K, SST-2 and Dolly."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from procon.data import load_conversations
from procon.demo import Problem
from procon.errors import ProConError

#: From an instruction and an answer, as the data set has them, to a problem.
Wording = Callable[[str, str], Problem]


def _plain(instruction: str, answer: str) -> Problem:
    return {"instruction": instruction, "output": answer}


def _worked(instruction: str, answer: str) -> Problem:
    """GSM8K: calculations in ``<<...>>`` are notes to a calculator, and ``####`` marks the result."""
    return _plain(instruction, re.sub(r"\s*####\s*", "\nAnswer: ", re.sub(r"<<.*?>>", "", answer)))


def _judged(instruction: str, answer: str) -> Problem:
    return _plain(f"Is this sentence positive or negative?\n{instruction.strip()}", f"Answer: {answer}")


@dataclass(frozen=True)
class PublicTask:
    """A data set as a task; the problems that are measured come from the split that is trained on, and from other rows.

    Attributes:
        source: on the hub, or a file.
        wording: of its problems.
        reply_tokens: longest reply.
        config, columns: as :func:`procon.data.load_conversations` takes them.
        metric: of :data:`procon.evaluation.rates.METRICS`.
    """

    label: str
    source: str
    wording: Wording
    reply_tokens: int
    config: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    metric: str = "exact"

    def problems(self, n: int, seed: int) -> list[Problem]:
        """``n`` distinct problems, in an order drawn from ``seed``.

        Raises:
            ProConError: if the data set cannot be read, or has fewer.
        """
        rows = load_conversations(self.source, config=self.config, columns=self.columns)
        found: dict[str, Problem] = {}
        for messages in rows["messages"]:
            problem = self.wording(*(turn["content"] for turn in messages))
            found.setdefault(problem["instruction"], problem)
        if len(found) < n:
            raise ProConError(f"data {self.source!r} has {len(found)} problems, and {n} are asked for: ask for fewer")
        return random.Random(seed).sample(list(found.values()), len(found))[:n]


PUBLIC_TASKS = {
    "gsm8k": PublicTask("GSM8K: arithmetic word problems", "openai/gsm8k", _worked, 320, config="main"),
    "sst2": PublicTask(
        "SST-2: sentiment of sentences", "SetFit/sst2", _judged, 8, columns={"prompt": "text", "response": "label_text"}
    ),
    "dolly": PublicTask(
        "Dolly: instructions of all kinds", "databricks/databricks-dolly-15k", _plain, 256, metric="rouge-l"
    ),
}
