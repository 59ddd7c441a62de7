"""One run of fine-tuning, as reports take it, and its file."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from procon.evaluation import Evaluation
from procon.evaluation.evaluation import text_of
from procon.files import load_json, save_json

T = TypeVar("T")

#: Characters of a run's name, which is drawn; and what a number in a run's file may be, at most.
_LONGEST_LABEL, _LARGEST = 1_000, 1e38


@dataclass(frozen=True)
class Run:
    """One way of fine-tuning, or the model before it.

    Attributes:
        label: what the run is called.
        evaluation: refusal, over-refusal and task accuracy at the end; None if they were not measured.
        cosine: signed cosine to the initial refusal direction, block by block; NaN where a block has none (paper
            section III-B). None if it was not measured.
        seconds_per_step: time of an optimiser step; None if the run did not train.
        history: rows of ``trainer.state.log_history``, whose keys ``step``, ``loss``, ``procon/penalty``,
            ``procon/alpha``, ``procon/drift_cos``, ``procon/refusal_malicious``, ``procon/refusal_benign`` and
            ``procon/task`` are plotted where they occur. Numbers that are not finite become None in JSON.
    """

    label: str
    evaluation: Evaluation | None
    cosine: list[float] | None = None
    seconds_per_step: float | None = None
    history: list[dict[str, Any]] = field(default_factory=list)

    @property
    def mean_cosine(self) -> float | None:
        """Mean of :attr:`cosine` over the blocks that have a direction; None without any."""
        known = [cosine for cosine in self.cosine or () if not math.isnan(cosine)]
        return sum(known) / len(known) if known else None

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers, for JSON; NaN becomes None."""
        data = asdict(self)
        if self.cosine is not None:
            data["cosine"] = [_finite_or_none(cosine) for cosine in self.cosine]
        data["history"] = [{key: _finite_or_none(value) for key, value in row.items()} for row in self.history]
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Run:
        """The run that :meth:`to_dict` was called on.

        Raises:
            KeyError, TypeError, ValueError: if ``data`` is of something else.
        """
        cosine, seconds, evaluation = data["cosine"], data["seconds_per_step"], data["evaluation"]
        if len(data["label"]) > _LONGEST_LABEL:
            raise ValueError(f"label has more than {_LONGEST_LABEL} characters")
        return cls(
            label=text_of(data, "label"),
            evaluation=None if evaluation is None else Evaluation.from_dict(evaluation),
            cosine=None if cosine is None else [math.nan if value is None else _number(value) for value in cosine],
            seconds_per_step=None if seconds is None else _number(seconds),
            history=[_row(row) for row in data["history"]],
        )

    def save(self, path: str | Path) -> Path:
        """Write a JSON file; returns its path."""
        return save_json(self.to_dict(), path)

    @classmethod
    def load(cls, path: str | Path) -> Run:
        """Read what :meth:`save` wrote.

        Raises:
            ProConError: if the file is missing, damaged, or holds something else.
        """
        return load_json(path, cls.from_dict, "run")

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and finite values of ``key`` in the history."""
        rows = [
            row for row in self.history if row.get("step") is not None and _finite_or_none(row.get(key)) is not None
        ]
        return [row["step"] for row in rows], [float(row[key]) for row in rows]

    def plain_loss(self) -> tuple[list[int], list[float]]:
        """Steps and the logged loss without the constraint's part of it, which is alpha times the penalty.

        Exact as long as alpha and the penalty's presence do not change between two rows of the log: a row has the alpha
        of its last step, and the penalty's mean over the steps that have one.
        """
        rows = [
            row for row in self.history if row.get("step") is not None and _finite_or_none(row.get("loss")) is not None
        ]
        weighted = [(row.get("procon/alpha") or 0.0) * (row.get("procon/penalty") or 0.0) for row in rows]
        return [row["step"] for row in rows], [
            float(row["loss"]) - part for row, part in zip(rows, weighted, strict=True)
        ]


def _number(value: object) -> float:
    """A number that plots can hold: their axes are as wide as twice that, and single precision is what trainers log."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{value!r:.40} is no number")
    if math.isfinite(value) and abs(value) > _LARGEST:
        raise ValueError(f"{value!r:.40} is larger than {_LARGEST:g}")
    return float(value)


def _row(row: dict[str, Any]) -> dict[str, Any]:
    """A row of a log: numbers at the names that are plotted, whatever trainers add at others."""
    for key, value in row.items():
        if value is not None and (key in ("step", "loss") or key.startswith("procon/")):
            _number(value)
    if type(row.get("step", 0)) is not int:
        raise TypeError(f"step is {row['step']!r:.40}, no whole number")
    return dict(row)


def _finite_or_none(value: T) -> T | None:
    return None if isinstance(value, float) and not math.isfinite(value) else value
