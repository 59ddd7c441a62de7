"""The section of a model card on how refusal was anchored."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, metadata_load, metadata_save

from procon.directions import DIRECTIONS_FILE, Directions
from procon.evaluation import Evaluation
from procon.files import whole_file, write_text

# Marks, and not headings: PEFT appends headings of its own to a card, below whatever stands last in it.
_BEGIN, _END = "<!-- procon -->", "<!-- /procon -->"

#: Above what :func:`write_evaluation` adds.
_MEASURED = "Measured afterwards:"

_SECTION = """\
## Refusal anchored with ProCon

This model was fine-tuned with procon-llm {version}. Penalised were departures from the starting model, {after}.
Nothing of ProCon is in the model, which loads and runs as any other of its kind.

| | |
|---|---|
{rows}

A model can find ways around what is kept, so measure what it does: `procon eval --model FOLDER`, and
`procon drift --start MODEL --tuned FOLDER` against the model it started from."""

#: By term, where it is kept and whose idea that is.
_AFTER = {
    "tokens": "along its refusal directions ([arXiv 2509.06795](https://arxiv.org/abs/2509.06795))",
    "probes": "at fixed prompts",
}


def write_section(card: Path, record: dict[str, Any], directions: Directions | None) -> None:
    """Put the section and the tag in a card, in place of an earlier one; the rest of it stays. Makes it if need be.

    A model of which no step so far was under the constraint has no section.

    Args:
        record: what ``procon.json`` holds.
        directions: those of the run; None if it had none.
    """
    if not record["constrained"]:
        drop_section(card)
        return
    text = card.read_text(encoding="utf-8") if card.exists() else ""
    # PEFT begins a card with the hub's template; with nothing filled in, it says nothing of the model.
    template = ModelCard.from_template(ModelCardData()).text.strip()
    name = card.absolute().parent.name
    text = text.replace(template, f"# {name}")
    # TRL's says None of a model in a folder, and of one that is not on the hub.
    of_none = "a fine-tuned version of [None](https://huggingface.co/None)"
    text = text.replace(of_none, "fine-tuned from a model in a folder").replace('model="None"', f'model="{name}"')
    marked = f"{_BEGIN}\n{describe(record, directions)}\n{_END}"
    text, replaced = _replaced(text, marked)
    with whole_file(card) as partial:
        text = text if replaced else f"{text.rstrip()}\n\n{marked}"
        partial.write_text(f"{text.strip()}\n", encoding="utf-8")
        metadata = metadata_load(partial) or {}
        tags = metadata.get("tags") or []
        tags = [tags] if isinstance(tags, str) else tags
        if "procon" not in tags:
            metadata_save(partial, {**metadata, "tags": [*tags, "procon"]})


def write_evaluation(card: Path, found: Evaluation) -> None:
    """Put what was measured of the model last into its card's section, if it has one."""
    text = card.read_text(encoding="utf-8") if card.exists() else ""
    if _BEGIN not in text:
        return
    rates = {
        f"malicious prompts refused, by {found.judge}": found.refusal_malicious,
        f"benign prompts refused, by {found.judge_benign}": found.refusal_benign,
        "task": found.task,
    }
    rows = [f"| {name} | {rate.hits:g} of {rate.total} |" for name, rate in rates.items() if rate]
    measured = "\n".join([_MEASURED, "", "| | |", "|---|---|", *rows, "", _END])
    write_text(re.sub(f"(?:{_MEASURED}.*?)?{_END}", lambda _: measured, text, flags=re.DOTALL), card)


def drop_section(card: Path) -> None:
    """Take the section out of a card."""
    text = card.read_text(encoding="utf-8") if card.exists() else ""
    if _BEGIN in text:
        write_text(_replaced(text, "")[0], card)


def describe(record: dict[str, Any], directions: Directions | None) -> str:
    """The section, in Markdown; arguments are those of :func:`write_section`."""
    did, best, terms, mean = record["did"], record.get("best"), record["states"], record["did"]["mean_penalty"]
    rows = {
        "optimiser steps under the constraint": f"{did['constrained_steps']} of {did['steps']}",
        "mean penalty, before alpha": "not finite" if mean is None else f"{mean:.3g}",
        "strength (alpha)": f"`{record['schedule']}`",
    }
    if best:
        rows["kept"] = f"the checkpoint of step {best['step']}, with the best {best['metric']}, {best['value']:.4g}"
    if mixed := [f"{count} {what}" for what, count in record.get("mixed_in", {}).items() if count]:
        rows["mixed into the training data"] = ", ".join(mixed)
    if directions is not None and "tokens" in terms:
        along = "its refusal direction" if directions.of_refusal else f"directions of {', '.join(directions.concepts)}"
        blocks = ", ".join(map(str, did["blocks_acted"]))
        rows |= {
            "training tokens": f"each block's input along {along}, at {record['scope']} tokens; "
            f"{record['penalty']} penalty",
            "blocks that it acted on": f"{blocks} of {directions.block_count}, from 0",
            "the op": terms["tokens"]["fusion"],
            "anchors": f"{record['anchors']} (`{terms['tokens']['anchors'] or terms['tokens']['starting_model']}`)",
            "directions": f"`{DIRECTIONS_FILE}` (`{record['directions']}`)",
        }
    if "probes" in terms:
        kept = "the last hidden state at the last token of probe prompts ([arXiv 2605.05995](https://arxiv.org/abs/2605.05995))"
        if tokens := record["probe_reply_tokens"]:
            kept = f"what it predicts along {tokens} tokens of the starting model's own replies to probe prompts"
        rows["probes"] = (
            f"{kept} ({record['probes']}), at most {record['probe_batch']} every {record['probe_every']} steps, with "
            f"weight {record['probe_weight']:g}"
        )
    return _SECTION.format(
        version=record["version"],
        after=" and ".join(_AFTER[term] for term in terms if term in _AFTER),
        rows="\n".join(f"| {name} | {value} |" for name, value in rows.items()),
    )


def _replaced(text: str, marked: str) -> tuple[str, int]:
    return re.subn(f"{_BEGIN}.*?{_END}", lambda _: marked, text, flags=re.DOTALL)
