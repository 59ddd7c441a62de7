"""One run of fine-tuning, as reports take it, and what it is read from: a training's output folder, or a file."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

from procon.errors import ProConError
from procon.evaluation import Evaluation
from procon.files import load_json

_KINDS = "give a training output folder, or a file of 'procon eval --output' or 'procon drift --output'"

#: Where a training leaves its log, in its output folder.
_STATE = "trainer_state.json"

#: What can be drawn, at most: axes are wider than their numbers.
_LARGEST = 1e38


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
            ``procon/task`` are plotted where they occur.
    """

    label: str
    evaluation: Evaluation | None = None
    cosine: Sequence[float] | None = None
    seconds_per_step: float | None = None
    history: Sequence[Mapping[str, Any]] = ()

    @property
    def mean_cosine(self) -> float | None:
        """Mean of :attr:`cosine` over the blocks that have a direction; or as last logged; None without either."""
        known = [cosine for cosine in self.cosine or () if not math.isnan(cosine)]
        logged = self.series("procon/drift_cos")[1][-1:]
        return sum(known) / len(known) if known else logged[0] if logged else None

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and finite values of ``key`` in the history."""
        known = [row for row in self.history if type(row.get("step")) is int]
        known = [row for row in known if _is_number(row["step"]) and _is_number(row.get(key))]
        return [row["step"] for row in known], [float(row[key]) for row in known]


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST


def read_runs(paths: Sequence[str | Path]) -> list[Run]:
    """A run from each file or folder; runs of one label get the names of their files behind it.

    - A training's output folder: its log, the drift as last logged, and an evaluation if one is there.
    - A file of ``procon eval --output`` or ``Evaluation.save``, or of ``procon drift --output``.

    Raises:
        ProConError: if there is nothing, or it holds no run.
    """
    runs = [_read(Path(path)) for path in paths]
    labels = [run.label for run in runs]
    return [
        replace(run, label=f"{run.label} ({path})") if labels.count(run.label) > 1 else run
        for run, path in zip(runs, paths, strict=True)
    ]


def _read(path: Path) -> Run:
    if os.path.isdir(path):  # False of a path that cannot be
        return _training(path)
    return load_json(path, lambda data: _recognise(data, path), "run")


def _recognise(data: dict[str, Any], path: Path) -> Run:
    if "refusal_malicious" in data:
        evaluation = Evaluation.from_dict(data)
        return Run(evaluation.label or path.stem, evaluation)
    if "cosine" in data:
        return Run(path.stem, cosine=[value if _is_number(value) else math.nan for value in data["cosine"]])
    raise ValueError(_KINDS)


def _training(folder: Path) -> Run:
    """What ``procon train`` or a trainer left in its output folder, and an evaluation if one was saved there."""
    if not (folder / _STATE).is_file():
        raise ProConError(f"run {str(folder)!r} is a folder without {_STATE}: {_KINDS}")
    run = Run(folder.absolute().name)
    run = load_json(folder / _STATE, lambda state: _logged(run, state["log_history"]), "training state")
    evaluations = [path for path in sorted(folder.glob("*.json")) if b'"refusal_malicious"' in path.read_bytes()]
    if len(evaluations) > 1:
        names = ", ".join(path.name for path in evaluations)
        raise ProConError(f"run {str(folder)!r} holds {len(evaluations)} evaluations ({names}): give one of the files")
    if not evaluations:
        return run
    if evaluations[0].stat().st_mtime < (folder / _STATE).stat().st_mtime:
        warnings.warn(
            f"{str(evaluations[0])!r} is older than the log of the training beside it: if that went on since, measure "
            f"again with procon eval {folder}",
            stacklevel=2,
        )
    return replace(run, evaluation=Evaluation.load(evaluations[0]))


def _logged(run: Run, history: list[dict[str, Any]]) -> Run:
    """The run with its log, and the time of a step of it, measuring included."""
    run = replace(run, history=[dict(row) for row in history])
    steps, seconds = run.series("train_runtime")
    return replace(run, seconds_per_step=seconds[-1] / steps[-1] if steps and steps[-1] else None)
