"""Contrast prompts: malicious instructions and benign ones on the same topics."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, get_args

from procon.errors import ProConError
from procon.files import parse_json

Split = Literal["extraction", "validation", "held_out", "safety"]


@dataclass(frozen=True)
class ContrastPrompts:
    """Malicious and benign instructions, one sentence each; built-in ones are twins, pair by pair.

    Attributes:
        categories: what each pair is about, as built-in ones have it; none if not given. Several directions per block
            come from them.
    """

    malicious: tuple[str, ...]
    benign: tuple[str, ...]
    categories: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("malicious", "benign"):
            if not getattr(self, name):
                raise ProConError(f"no {name} prompts given: at least one is needed")
        if self.categories and not len(self.categories) == len(self.malicious) == len(self.benign):
            raise ProConError(
                f"there are {len(self.categories)} categories for {len(self.malicious)} malicious and "
                f"{len(self.benign)} benign prompts: give pairs, and the category of each"
            )

    def first(self, n: int) -> ContrastPrompts:
        """The first ``n`` of each side."""
        return ContrastPrompts(self.malicious[:n], self.benign[:n], self.categories[:n])

    @property
    def hash(self) -> str:
        """A short hash of the wording and order of all prompts, for provenance."""
        return hashlib.sha256(json.dumps([self.malicious, self.benign]).encode()).hexdigest()[:16]


#: Of the extraction pairs: those that drift is measured on. The others are probes.
_DRIFT_PAIRS = 64


@cache
def asset_lines(name: str) -> list[dict[str, str]]:
    """Rows of a JSONL file of this package."""
    text = files("procon.assets").joinpath(name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines() if line]


def builtin_prompts(split: Split) -> ContrastPrompts:
    """The prompts written for this project, in 16 categories.

    ``extraction`` (192 pairs) finds the directions, ``validation`` and ``held_out`` (64 each) measure, ``safety`` (720)
    is training material for refusals: no measuring split is ever trained on.

    Rows alternate between the categories, so that the first ``n`` of a split cover as many as they can.
    """
    if split not in get_args(Split):
        raise ProConError(f"there are no built-in prompts {split!r}: choose one of {', '.join(get_args(Split))}")
    pairs = sorted(
        (p for p in asset_lines("pairs.jsonl") if p["split"] == split), key=lambda p: p["id"].rsplit("-", 1)[1]
    )
    return ContrastPrompts(*(tuple(pair[part] for pair in pairs) for part in ("malicious", "benign", "category")))


def builtin_drift_pairs() -> ContrastPrompts:
    """The 64 of ``extraction`` on which the drift of directions is measured."""
    return builtin_prompts("extraction").first(_DRIFT_PAIRS)


def builtin_probe_pairs() -> ContrastPrompts:
    """The 128 of ``extraction`` on which drift is not measured: at prompts that are kept it would look smaller than it
    is. Probes are the malicious ones; own replies, kept or mixed in, are to both sides."""
    pairs = builtin_prompts("extraction")
    return ContrastPrompts(pairs.malicious[_DRIFT_PAIRS:], pairs.benign[_DRIFT_PAIRS:])


def builtin_refusals() -> tuple[str, ...]:
    """Short refusals in an assistant's voice, that fit any malicious instruction."""
    return tuple(line["refusal"] for line in asset_lines("refusals.jsonl"))


def load_instructions(path: str | Path) -> tuple[str, ...]:
    """Instructions from a file: ``.txt``, one per line, or ``.jsonl``/``.json``.

    A row has the key ``instruction`` or ``prompt``, or is the bare text. A ``.json`` file holds a list of rows, and a
    ``.jsonl`` file one per line.

    Raises:
        ProConError: if the file is missing, damaged or without prompts, or a row has neither key.
    """
    path = Path(path)
    prompts = []
    for number, row in json_rows(path, "prompt file", lines=path.suffix.lower() == ".txt"):
        prompt = row.get("instruction", row.get("prompt")) if isinstance(row, dict) else row
        if not isinstance(prompt, str):
            raise ProConError(f"prompt file {str(path)!r}, row {number}: no key 'instruction' or 'prompt' with a text")
        if prompt.strip():
            prompts.append(prompt.strip())
    if not prompts:
        raise ProConError(f"prompt file {str(path)!r} holds no prompts: give one per line")
    return tuple(prompts)


def json_rows(path: Path, what: str, *, lines: bool = False) -> Iterator[tuple[int, Any]]:
    """Number and content of each row of a file: of a JSON list, or one JSON text per line, or the ``lines`` themselves.

    Args:
        what: how messages call the file.

    Raises:
        ProConError: if there is no such file, or it is damaged.
    """
    if not os.path.isfile(path):
        raise ProConError(f"{what} {str(path)!r} does not exist: check the path")
    number = 0
    try:
        text = path.read_text(encoding="utf-8-sig")  # a byte order mark is no part of a text
        if text.lstrip().startswith("[") and not lines:
            yield from enumerate(parse_json(text), 1)
            return
        # At line feeds alone: a JSON text may have U+2028 and its like as they are.
        for number, line in enumerate(filter(str.strip, text.split("\n")), 1):
            yield number, line if lines else parse_json(line)
    except ValueError as error:
        row = f"row {number}: " * bool(number)
        raise ProConError(f"{what} {str(path)!r} cannot be read ({row}{error}): give UTF-8 text or JSON") from error
