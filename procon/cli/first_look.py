"""What is wrong with a command line, found before anything heavy is imported: names, types, choices, missing files."""

from __future__ import annotations

import argparse
import ast
import os
import re
from collections.abc import Collection, Sequence
from dataclasses import fields
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from procon.cli.help import groups_of
from procon.cli.registry import COMMANDS
from procon.cli.training_arguments import ShownTrainingArguments
from procon.errors import ProConError
from procon.settings import check_choice, check_name

#: How names of data files end; another name may be that of a data set on the hub.
DATA_SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")

#: What a file that does not exist is called, by settings, and the remedy.
_MISSING = {
    ("config",): ("config file", ": check the path"),
    ("data", "eval_data", "safety_data", "task"): ("data file", ": check the path"),
    ("malicious", "benign", "procon_probes"): ("prompt file", ""),
    ("directions", "add"): ("directions file", ": make it with 'procon directions'"),
    ("vectors",): ("vectors file", ""),
    ("runs", "first", "second"): ("run", ": give the path of a file or a folder that does"),
}
_FILES = {name: said for names, said in _MISSING.items() for name in names}


def check(name: str, argv: Sequence[str]) -> None:
    """Raise ProConError for what is wrong with the settings of command ``name`` without a look into any file.

    Types of transformers' arguments are those of the installed version. What is not known here is left to the parser.
    """
    command = COMMANDS[name]
    further = _training_arguments() if command.trains else {}
    parser = argparse.ArgumentParser(prog=f"procon {name}", add_help=False, allow_abbrev=False)

    def refuse(message: str) -> NoReturn:
        raise ProConError(f"{message}; see 'procon {name} --help'")

    parser.error = refuse
    parser.add_argument("--config")
    settings = [setting for group in groups_of(command) for setting in group.settings]
    others = further.keys() | ({field.name for field in fields(ShownTrainingArguments)} if command.trains else set())
    own = [setting for setting in settings if setting.name not in others]
    for setting in own:
        kind = {"N": int, "X": float}.get(setting.kind, str)
        _add(parser, setting.name, kind, "?" if setting.kind == "SWITCH" else "+" if setting.several else None)
    for setting, annotation in further.items():
        number = re.fullmatch(r"(int|float)( \| None)?", annotation)
        _add(parser, setting, {"int": int, "float": float}[number[1]] if number else str, None if number else "*")
        _add(parser, f"no_{setting}", str, "*")
    if further or not command.trains:
        # Before what is missing: a flag that is misspelt is the likely cause.
        known = {setting.name for setting in settings} | further.keys()
        for flag in (word for word in argv if word.startswith("--") and word != "--"):
            if flag.partition("=")[0] not in parser._option_string_actions:
                raise ProConError(f"there is no setting {flag!r}{hint(flag, known)}")
    read = vars(parser.parse_known_args(argv)[0])
    missing = [f"--{setting.name}" for setting in own if setting.required and read[setting.name] is None]
    if missing and not read["config"]:
        refuse(f"the following arguments are required: {', '.join(missing)}")
    for setting in own:
        value = read[setting.name]
        if value and setting.choices:
            check_choice(setting.name, value, setting.choices)
        if value and setting.kind == "MODEL":
            check_name(value)
    for setting in _FILES.keys() & read.keys():
        values = read[setting] if isinstance(read[setting], list) else [read[setting]]
        for value in filter(None, values):
            _check_file(setting, value)


def hint(unknown: str, known: Collection[str]) -> str:
    """What an unknown setting may be meant for; with dashes if it was a flag."""
    close = get_close_matches(unknown.split("=")[0].lstrip("-").replace("-", "_"), known, n=1)
    dashes = "--" if unknown.startswith("-") else ""
    return f"; did you mean {dashes + close[0]!r}?" if close else ": see --help for the names"


def _add(parser: argparse.ArgumentParser, name: str, kind: type[Any], count: str | None) -> None:
    parser.add_argument(*dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")), type=kind, nargs=count)


def _check_file(setting: str, value: str) -> None:
    what, remedy = _FILES[setting]
    may_be_on_the_hub = what == "data file" and Path(value).suffix.lower() not in DATA_SUFFIXES
    if not may_be_on_the_hub and not os.path.exists(value):
        raise ProConError(f"{what} {value!r} does not exist{remedy}")


def _training_arguments() -> dict[str, str]:
    """Names and types of the installed TrainingArguments, read in their source: importing them takes seconds.

    Empty if they are not found there.
    """
    found = find_spec("transformers")
    for folder in (found and found.submodule_search_locations) or ():
        try:
            source = ast.parse((Path(folder) / "training_args.py").read_text(encoding="utf-8")).body
        except (OSError, ValueError, SyntaxError):
            continue
        for item in source:
            match item:
                case ast.ClassDef(name="TrainingArguments", bases=[], body=body):
                    return {
                        str(field.target.id): ast.unparse(field.annotation)
                        for field in body
                        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
                    }
    return {}
