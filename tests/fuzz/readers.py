"""Every function of the library that reads a file or parses a setting, found by what it calls and how it is named.

The campaign has to reach each of them, so that a new one cannot be forgotten: see ``unreached``.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import procon

ROOT = Path(procon.__file__).parent

#: Calls that take in what somebody else wrote, and names of functions that do.
_CALLS = {"read_text", "read_bytes", "open", "loads", "safe_load", "safe_open", "load_file", "metadata_load"}
_CALLS |= {"parse_json", "load_json", "urlsplit", "literal_eval"}
_NAMES = re.compile(r"(parse|load|read)(_\w+)?|from_dict")

#: Rooms, files and functions that the campaign leaves out, and why.
LEFT_OUT = {
    "anchors": "anchors, whose every byte is under a checksum: python tests/faults",
    "chat/prompts.py _asset_lines": "comes with the package",
    "cli/parsing.py _training_arguments": "the source of transformers",
    "data/prompt_sets.py": "data sets of the hub",
    "evaluation/judges": "answers of a server: tests/evaluation",
    "evaluation/endpoint.py": "answers of a server: tests/evaluation",
    "demo": "files of the package, or checked by a hash",
    "files.py sync": "waits for the disk",
    "integrations": "settings that a framework has read",
    "kernels": "tensors, of which they load rows",
    "method": "what a training left behind: python tests/faults",
    "models": "a model, which transformers reads",
    "ranks.py share_files": "files of anchors, as another rank has them",
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
            places = (file, file.partition("/")[0], file.rpartition("/")[0], f"{file} {item.name}")
            if (calls & _CALLS or _NAMES.fullmatch(item.name) or checks) and not LEFT_OUT.keys() & set(places):
                yield file, item.name, min([item.lineno, *(x.lineno for x in item.decorator_list)])


def unreached(kinds: dict[str, Any], outcome: Callable[..., Any], most: int = 200) -> list[str]:
    """Readers that none of the first inputs of each kind reaches."""
    left = {(str(ROOT / file), line): f"{file} {name}" for file, name, line in readers()}

    def called(frame: Any, event: str, _: object) -> None:
        if event == "call":
            left.pop((frame.f_code.co_filename, frame.f_code.co_firstlineno), None)

    for number in range(most):
        for name, kind in kinds.items():
            kind.make(Random(f"{name} {number}"))  # not what makes an input
            sys.setprofile(called)
            try:
                outcome(kind, name, number)
            finally:
                sys.setprofile(None)
        if not left:
            break
    return sorted(left.values())
