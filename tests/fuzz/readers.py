"""Every function of the library that reads a file or parses a setting, found by what it calls and how it is named.

The campaign has to reach each of them, so that a new one cannot be forgotten: see ``unreached``.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random

from campaign import Kind, outcome

import procon

ROOT = Path(procon.__file__).parent

#: Calls that take in what somebody else wrote, and names of functions that do.
_CALLS = {"read_text", "read_bytes", "open", "loads", "safe_load", "safe_open", "load_file", "metadata_load"}
_CALLS |= {"parse_json", "load_json", "urlsplit", "literal_eval"}
_NAMES = re.compile(r"(parse|load|read)(_\w+)?|from_dict")

#: Files and functions that the campaign leaves out, and why.
LEFT_OUT = {
    "anchors/ranks.py": "between ranks of one training",
    "anchors/shards.py": "anchors, whose every byte is under a checksum: python tests/faults",
    "chat/prompts.py _asset_lines": "comes with the package",
    "cli/first_look.py _training_arguments": "the source of transformers",
    "cli/arguments.py __post_init__": "settings that the parser has typed",
    "cli/completion.py": "prints a script",
    "demo": "a wheel that is checked by its hash",
    "files.py sync": "waits for the disk",
    "integrations/axolotl.py": "settings that axolotl has read",
    "method/record.py": "what a training left behind: python tests/faults",
    "models/loading.py load_model": "a model, which transformers reads",
    "models/loading.py parse_dtype": "a word that was checked",
    "report/html.py": "comes with the package",
    "training": "what a training left behind: python tests/faults",
}


def readers() -> Iterator[tuple[str, str, int]]:
    """File, name and line of each."""
    for path in sorted(ROOT.rglob("*.py")):
        file = path.relative_to(ROOT).as_posix()
        for item in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(item, ast.FunctionDef):
                continue
            inner = list(ast.walk(item))
            calls = {getattr(x.func, "attr", getattr(x.func, "id", "")) for x in inner if isinstance(x, ast.Call)}
            checks = item.name == "__post_init__" and any(isinstance(x, ast.Raise) for x in inner)
            reads = calls & _CALLS or _NAMES.fullmatch(item.name) or checks
            places = (file, file.partition("/")[0], f"{file} {item.name}")
            if reads and not any(place in LEFT_OUT for place in places):
                yield file, item.name, min([item.lineno, *(x.lineno for x in item.decorator_list)])


def unreached(kinds: dict[str, Kind], most: int = 40) -> list[str]:
    """Readers that none of the first inputs of the quick kinds reaches."""
    left = {(str(ROOT / file), line): f"{file} {name}" for file, name, line in readers()}

    def called(frame: object, event: str, _: object) -> None:
        if event == "call":
            left.pop((frame.f_code.co_filename, frame.f_code.co_firstlineno), None)  # pyright: ignore

    quick = {name: kind for name, kind in kinds.items() if kind.count >= 1_500}
    for number in range(most):
        for name, kind in quick.items():
            made = kind.make(Random(f"{name} {number}"))
            sys.setprofile(called)
            try:
                outcome(Kind(lambda _, made=made: made, kind.take, 1), name, number)
            finally:
                sys.setprofile(None)
        if not left:
            break
    return sorted(left.values())
