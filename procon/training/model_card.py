"""The section of a model card on how refusal was anchored."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import metadata_load, metadata_save

from procon.directions import DIRECTIONS_FILE, Directions
from procon.files import whole_file, write_text
from procon.schedule import AlphaSchedule, Phase
from procon.version import __version__

_TAG = "procon"

# Marks, and not headings: PEFT appends headings of its own to a card, below whatever stands last in it.
_BEGIN, _END = "<!-- procon -->", "<!-- /procon -->"

#: What a run may have logged of the tuned model: the log's name, what it is, and how it is written.
_MEASURES = {
    "procon/drift_cos": ("mean cosine of re-extracted directions to the first", "{:.3f}"),
    "procon/refusal_malicious": ("refusal of malicious prompts (keywords)", "{:.0%}"),
    "procon/refusal_benign": ("refusal of benign prompts (keywords)", "{:.0%}"),
    "procon/task": ("accuracy on a task", "{:.0%}"),
}

_SECTION = """\
## Refusal anchored with ProCon

This model was fine-tuned with procon-llm {version}, after *Anchoring Refusal Direction: Mitigating Safety Risks in
Tuning via Projection Constraint* ([arXiv 2509.06795](https://arxiv.org/abs/2509.06795)). Penalised were departures from
the starting model: {kept}.
Nothing of ProCon is in the model, which loads and runs as any other of its kind.

| | |
|---|---|
{rows}

Not measured in this run: {unmeasured}.
A model can route around one direction per block, so measure what it does: `procon eval --model FOLDER`, and
`procon drift --start MODEL --tuned FOLDER` against the model it started from.
{load}
### Citation

```bibtex
@article{{du2025anchoring,
  title   = {{Anchoring Refusal Direction: Mitigating Safety Risks in Tuning via Projection Constraint}},
  author  = {{Du, Yanrui and Fan, Fenglei and Zhao, Sendong and Cao, Jiawei and Lin, Qika and He, Kai and Liu, Ting and
             Qin, Bing and Feng, Mengling}},
  journal = {{arXiv preprint arXiv:2509.06795}},
  year    = {{2025}}
}}
```"""


_LOAD = """
The directions, from a copy of this folder:

```python
from procon import Directions

directions = Directions.load(folder)
```
"""

_UNCONSTRAINED = """\
## Trained without ProCon's constraint

This model was fine-tuned by procon-llm {version} without the projection constraint: {why}."""


def describe(settings: dict[str, Any], directions: Directions | None, log_history: Sequence[dict[str, Any]]) -> str:
    """The section, in Markdown; that of a model without the constraint if no step so far was under it.

    Args:
        settings: what ``procon.json`` holds.
        directions: those of the run; None if it had none.
        log_history: the Trainer's, of which the last value of each measure is shown.
    """
    did, best = settings["did"], settings.get("best")
    if best:
        log_history = [entry for entry in log_history if entry["step"] <= best["step"]]
    if not did["constrained_steps"]:
        return describe_unconstrained(f"none of its {did['steps']} steps was under it ({settings['schedule']})")
    mean = did["mean_penalty"]
    rows = {
        "optimiser steps under the constraint": f"{did['constrained_steps']} of {did['steps']}",
        **({"kept": _kept(best)} if best else {}),
        "mean penalty, before alpha": "not finite" if mean is None else f"{mean:.3g}",
        "strength (alpha)": _strength(AlphaSchedule.parse(settings["schedule"])),
        **_anchors(settings),
        **_along(settings, directions),
        "last logged penalty, before alpha": _last(log_history, "procon/penalty", "{:.3g}") or "not logged",
    }
    unmeasured = []
    for name, (label, form) in _MEASURES.items():
        value = _last(log_history, name, form)
        if value is None:
            unmeasured.append(label)
        else:
            rows[label] = value
    kept = []
    if directions is not None:
        refusal = directions.of_refusal
        along = "its refusal direction" if refusal else f"directions of {', '.join(directions.concepts)}"
        kept.append(f"of each block's input along {along}, on training tokens")
    if "probes" in settings["terms"]:
        kept.append("of the last hidden state, at probe prompts")
    return _SECTION.format(
        version=settings["version"],
        kept="; and ".join(kept),
        load="" if directions is None else _LOAD,
        rows="\n".join(f"| {name} | {value} |" for name, value in rows.items()),
        unmeasured="; ".join(unmeasured) or "whether any of this holds beyond the prompts used",
    )


def describe_unconstrained(why: str = "alpha was 0") -> str:
    """The section of a model that was trained without the constraint."""
    return _UNCONSTRAINED.format(version=__version__, why=why)


def drop_section(card: Path) -> None:
    """Take the section out of a card."""
    text = card.read_text(encoding="utf-8") if card.exists() else ""
    if _BEGIN in text:
        write_text(_replaced(text, "")[0], card)


def write_section(card: Path, section: str) -> None:
    """Put ``section`` and the tag in a card, in place of an earlier one; the rest of it stays. Makes it if need be."""
    with whole_file(card) as partial:
        partial.write_text(_with_section(card, section), encoding="utf-8")
        metadata = metadata_load(partial) or {}
        tags = metadata.get("tags") or []
        tags = [tags] if isinstance(tags, str) else tags
        if _TAG not in tags:
            metadata_save(partial, {**metadata, "tags": [*tags, _TAG]})


def write_unconstrained(card: Path) -> None:
    """Say in a card that the model was trained without the constraint, if there is a card."""
    if card.exists():
        write_text(_with_section(card, describe_unconstrained()), card)


def _with_section(card: Path, section: str) -> str:
    text = card.read_text(encoding="utf-8") if card.exists() else ""
    marked = f"{_BEGIN}\n{section}\n{_END}"
    text, replaced = _replaced(text, marked)
    text = text if replaced else f"{text.rstrip()}\n\n{marked}"
    return f"{text.strip()}\n"


def _replaced(text: str, marked: str) -> tuple[str, int]:
    return re.subn(f"{_BEGIN}.*?{_END}", lambda _: marked, text, flags=re.DOTALL)


def _kept(best: dict[str, Any]) -> str:
    return f"the checkpoint of step {best['step']}, with the best {best['metric']}, {best['value']:.4g}"


def _strength(schedule: AlphaSchedule) -> str:
    def describe_phase(number: int, phase: Phase) -> str:
        if phase.length is None:
            return f"{phase.alpha:g} {'throughout' if number == 0 else 'to the end'}"
        unit = {"ep": "epoch", "steps": "step"}[phase.unit] + ("" if phase.length == 1 else "s")
        return f"{phase.alpha:g} for {phase.length:g} {'extra ' if number < schedule.extra else ''}{unit}"

    phases = ", then ".join(describe_phase(number, phase) for number, phase in enumerate(schedule.phases))
    return f"{phases} (`{schedule}`)"


def _anchors(settings: dict[str, Any]) -> dict[str, str]:
    """What the model was kept near to: a row for each term."""
    rows = {}
    terms = settings["terms"]
    if "tokens" in terms:
        live = terms["tokens"].get("starting_model")
        rows["constrained tokens"] = settings["scope"]
        rows["anchors"] = (
            f"projections of each batch under the starting model (`{live}`)"
            if live
            else f"projections of the training tokens before training (`{terms['tokens']['anchors']}`)"
        )
    if "probes" in terms:
        reply = " and all along the starting model's own reply" if settings["probe_reply_tokens"] else ""
        rows["probes"] = (
            f"the last hidden state at the last token{reply} of probe prompts ({settings['probes']}), at most "
            f"{settings['probe_batch']} every {settings['probe_every']} steps, with weight {settings['probe_weight']:g}"
        )
    return rows


def _blocks(blocks: Sequence[int], count: int) -> str:
    inputs = [block for block in blocks if block < count]
    run = len(inputs) > 1 and inputs == list(range(inputs[0], inputs[-1] + 1))
    which = f"{inputs[0]} to {inputs[-1]}" if run else ", ".join(map(str, inputs))
    described = [f"{which} of {count}, from 0"] if inputs else []
    return "; ".join(described + ["the last block's output"] * (len(inputs) < len(blocks)))


def _along(settings: dict[str, Any], directions: Directions | None) -> dict[str, str]:
    """What the penalty of the training tokens is made of; nothing without directions."""
    if directions is None:
        return {}
    return {
        "blocks that it acted on": _blocks(settings["did"]["blocks_acted"], directions.block_count),
        "constrained blocks": _blocks(settings["blocks"], directions.block_count),
        "penalty": f"{settings['penalty']}, {settings['units']} units",
        "directions": f"`{DIRECTIONS_FILE}` (`{settings['directions']}`){_origin(directions)}",
        **_concepts(directions),
    }


#: Controls, by what :class:`Directions` leaves of their origin.
_CONTROLS = {
    "random_seed": "random ones",
    "random_within_seed": "random ones with the hidden states' covariance",
    "shuffled_seed": "those of another block each",
}


def _concepts(directions: Directions) -> dict[str, str]:
    """Where each concept has a direction, if they are named."""
    if directions.of_refusal:
        return {}
    there = directions.basis.any(-1)
    sites = {name: there[:, number].nonzero().flatten().tolist() for number, name in enumerate(directions.concepts)}
    return {f"blocks of {name}": _blocks(blocks, directions.block_count) for name, blocks in sites.items()}


def _origin(directions: Directions) -> str:
    """How many directions per block there are, and where they came from, as far as their provenance says."""
    provenance = directions.provenance
    several = f", {directions.k} per block" if directions.k > 1 else ""
    if not directions.of_refusal:
        return several
    for name, control in _CONTROLS.items():
        if name in provenance:
            return f"{several}, {control} (seed {provenance[name]}): a control"
    model, counts, rate = (provenance.get(name) for name in ("model", "counts", "refusal_rate"))
    # Whoever made the file may have written anything into it.
    if not (isinstance(counts, dict) and all(type(counts.get(side)) is int for side in ("positive", "negative"))):
        return several
    rate = rate if isinstance(rate, float | int) else None
    # A folder's name is enough: the path to it is of no use to others.
    model = Path(str(model)).name if model and Path(str(model)).is_absolute() else model
    model = re.sub(r"[^\w./@:+ -]", "", str(model or ""))
    origin = f"{several}: of {model or 'the model before training'}, from {counts['positive']} malicious and "
    origin += f"{counts['negative']} benign prompts"
    return origin if rate is None else f"{origin}; it then refused {rate:.0%} of malicious ones"


def _last(log_history: Sequence[dict[str, Any]], name: str, form: str) -> str | None:
    for entry in reversed(log_history):
        if name in entry:
            return f"{form.format(entry[name])} at step {entry['step']}"
    return None
