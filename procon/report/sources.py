"""What can be reported: files and folders of several kinds, recognised by their content, each read as a run."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from procon.chat import Split, builtin_prompts
from procon.errors import ProConError
from procon.evaluation import Evaluation, Rate
from procon.files import NO_SUCH_CONTENT, load_json, parse_json
from procon.report.run import Run

_KINDS = (
    "give a run file, a file of 'procon eval --output' or 'procon drift --output', a training output folder or a run "
    "file of the study"
)

#: What a training leaves in its output folder.
_RECORD, _STATE, _LOG = "procon.json", "trainer_state.json", "log.jsonl"

#: Facts of a training's record that differ between any two of them, or say what came of it.
_NO_SETTINGS = ("run", "arguments", "terms", "did", "window", "checksum", "complete", "files", "resumable")

#: What the names of an evaluation's settings begin with.
EVALUATION = "evaluation."

#: Where a training logs the cosine of each block.
_BY_BLOCK = "procon/drift_cos_block/"

#: A number of a block in a log, at most.
_MOST_BLOCKS = 10_000


@dataclass(frozen=True)
class Source:
    """A run, and what it was made by.

    Attributes:
        path: where it was read.
        run: it.
        kind: what it was read from.
        settings: what it was made by, by name, and what its evaluation was made by, behind :data:`EVALUATION`; without
            what the file does not say.
    """

    path: Path
    run: Run
    kind: Literal["run", "evaluation", "drift", "study", "training"]
    settings: dict[str, Any] = field(default_factory=dict)


def read_source(path: str | Path) -> Source:
    """Read a run from a file or a folder.

    Raises:
        ProConError: if there is nothing, or it holds no run.
    """
    path = Path(path)
    if os.path.isdir(path):
        return _with_evaluation(_training(path))
    if not os.path.exists(path):
        raise ProConError(f"run {str(path)!r} does not exist: {_KINDS}")
    return _with_evaluation(load_json(path, lambda data: _recognise(data, path), "run"))


def _with_evaluation(source: Source) -> Source:
    evaluation = source.run.evaluation
    if evaluation is None or source.kind == "study":  # whose settings say it
        return source
    own = {f"{EVALUATION}sources": evaluation.sources or None, **measured_by(evaluation)}
    return replace(source, settings={**source.settings, **own})


def measured_by(evaluation: Evaluation) -> dict[str, Any]:
    """What the rates of ``evaluation`` depend on beside the model: judges, metric, how it was asked."""
    found = {"judge": evaluation.judges[0], "judge_benign": evaluation.judge_benign, "metric": evaluation.metric}
    return {f"{EVALUATION}{name}": value for name, value in {**found, **evaluation.chat}.items()}


def read_sources(paths: Sequence[str | Path]) -> list[Source]:
    """Each of them; runs of one label get the names of their files behind it."""
    sources = [read_source(path) for path in paths]
    labels = [source.run.label for source in sources]
    return [
        replace(source, run=replace(source.run, label=f"{source.run.label} ({source.path})"))
        if labels.count(source.run.label) > 1
        else source
        for source in sources
    ]


def _recognise(data: Any, path: Path) -> Source:
    keys = data.keys() if isinstance(data, dict) else set()
    if {"evaluation", "history"} <= keys:
        return Source(path, Run.from_dict(data), "run")
    if _is_evaluation(data):
        evaluation = Evaluation.from_dict(data)
        return Source(path, Run(evaluation.label or path.stem, evaluation), "evaluation")
    if {"setting", "method", "seed", "replies"} <= keys:
        return _of_study(data, path)
    if {"mean_cosine", "cosine"} <= keys:
        return Source(path, _checked(path.stem, None, data["cosine"]), "drift")
    raise ValueError(_KINDS)


def _is_evaluation(data: Any) -> bool:
    return isinstance(data, dict) and {"refusal_malicious", "refusal_benign", "replies"} <= data.keys()


def _checked(
    label: str,
    evaluation: Evaluation | None,
    cosine: Sequence[float | None] | None,
    seconds: float | None = None,
    history: Sequence[Mapping[str, Any]] = (),
) -> Run:
    """A run of what a file holds, checked as that of a run's own file is."""
    data = {"label": label, "cosine": cosine, "seconds_per_step": seconds, "history": history}
    return replace(Run.from_dict({**data, "evaluation": None}), evaluation=evaluation)


def _of_study(data: dict[str, Any], path: Path) -> Source:
    """A run of ``benchmarks/study``."""
    method, made, steps = data["method"], data["made"], data.get("steps")
    label = f"{method['label']}, {data['setting']}, seed {data['seed']}"
    seconds = data["train_seconds"] / steps if steps else None
    config = {name: value for name, value in method.items() if name not in ("name", "label", "config", "settings")}
    return Source(
        path,
        _checked(label, _replies_of_study(data, label), data["drift"]["cosine"], seconds, data.get("history", ())),
        "study",
        {
            **{name: data.get(name) for name in ("setting", "seed", "split", "samples", "steps")},
            **config,
            **method["settings"],
            **method["config"],
            **{name: made.get(name) for name in ("commit", "machine", "python", "torch", "transformers", "peft")},
        },
    )


def _replies_of_study(data: dict[str, Any], label: str) -> Evaluation:
    """Its replies with their prompts, which the file leaves out: built-in ones, and numbered ones of a task."""
    split = data["split"]
    builtin = builtin_prompts(split) if split in get_args(Split) else None
    replies = []
    for kind, found in data["replies"].items():
        prompts = list(getattr(builtin, kind, ()))
        if len(prompts) != len(found):
            prompts = [f"{kind} {number} of {data['setting']}, {split}" for number in range(1, len(found) + 1)]
        replies += [
            {"kind": kind, "prompt": prompt, "reference": "", **reply}
            for prompt, reply in zip(prompts, found, strict=True)
        ]

    def rate(mark: str, *kinds: str) -> Rate:
        return Rate.of(bool(reply[mark]) for reply in replies if reply["kind"] in kinds)

    return Evaluation(
        label=label,
        refusal_malicious=rate("refused", "malicious"),
        refusal_benign=rate("refused", "benign"),
        degenerate=rate("degenerate", "malicious", "benign"),
        task=rate("correct", "task") if data["replies"].get("task") else None,
        replies=replies,
    )


def _training(folder: Path) -> Source:
    """What ``procon train`` or a trainer left in its output folder, and an evaluation if one was saved there."""
    run, has_record = _logged(folder), (folder / _RECORD).is_file()
    if not run.history and not has_record:
        raise ProConError(f"run {str(folder)!r} is a folder without {_RECORD}, {_STATE} or {_LOG}: {_KINDS}")
    settings = load_json(folder / _RECORD, _settings, "record") if has_record else {}
    return Source(folder, replace(run, evaluation=_evaluation_in(folder)), "training", settings)


def _settings(record: dict[str, Any]) -> dict[str, Any]:
    """What a training was made by, of its record."""
    settings = {name: value for name, value in record.items() if name not in _NO_SETTINGS}
    return settings | {**record.get("run", {}), **record.get("arguments", {})}


def _logged(folder: Path) -> Run:
    """A run of all that was logged, under the Trainer's own names."""
    label = folder.name or str(folder)
    if (folder / _STATE).is_file():
        return load_json(folder / _STATE, lambda state: _run_of(label, state["log_history"]), "training state")
    if not (folder / _LOG).is_file():
        return _run_of(label, [])
    try:
        rows = [parse_json(line) for line in (folder / _LOG).read_text(encoding="utf-8").splitlines()]
        return _run_of(label, [{name.removeprefix("train/"): row[name] for name in row} for row in rows])
    except NO_SUCH_CONTENT as error:
        raise ProConError(f"log {str(folder / _LOG)!r} is damaged or holds something else ({error})") from error


def _run_of(label: str, history: Sequence[Mapping[str, Any]]) -> Run:
    last = next((row for row in reversed(history) if any(name.startswith(_BY_BLOCK) for name in row)), {})
    cosine = {int(name.removeprefix(_BY_BLOCK)): value for name, value in last.items() if name.startswith(_BY_BLOCK)}
    if cosine and max(cosine) > _MOST_BLOCKS:
        raise ValueError(f"block {max(cosine)}")
    by_block = [cosine.get(block, math.nan) for block in range(max(cosine) + 1)] if cosine else None
    times = next((row for row in reversed(history) if "step_seconds" in row), {})
    seconds = times.get("step_cpu_seconds", times.get("step_seconds"))
    return _checked(label, None, by_block, seconds, history)


def _evaluation_in(folder: Path) -> Evaluation | None:
    """The one that was saved in ``folder``."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        try:
            data = parse_json(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if _is_evaluation(data):
            found[path] = data
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise ProConError(f"run {str(folder)!r} holds {len(found)} evaluations ({names}): give one of the files")
    for path in found:
        return Evaluation.load(path)
    return None
