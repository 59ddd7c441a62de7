"""``--help`` of each command, in groups, without loading what the command itself needs.

What it shows comes from the same dataclasses as the command's own parser; a test compares the two. Tab completion is
made from it, too.
"""

from __future__ import annotations

import argparse
import shutil
import types
from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, fields
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from procon.cli.arguments import DRIFT, MODEL_AND_DATA, PROCESSES
from procon.cli.loading import LOADING
from procon.cli.registry import COMMANDS, Command
from procon.cli.training_arguments import ShownTrainingArguments
from procon.settings import CHOICES, ProConSettings

_NOTES = (
    "Settings may also stand in a YAML file, by the same names: --config FILE.yaml. Flags win over it. Names take "
    "dashes too: --batch-size is --batch_size."
)
_TRAINING_NOTE = "All of transformers' TrainingArguments are accepted, not only those listed."

#: What the values of some settings are; those of others follow from their type.
_FILES = {
    *("add", "benign", "config", "data", "directions", "malicious", "negative", "output", "positive"),
    *("eval_data", "procon_probes", "runs", "safety_data", "task", "vectors", "first", "second"),
}
_FOLDERS = {"output_dir", "procon_anchors_dir"}
_MODELS = {"model", "start", "tuned"}


@dataclass(frozen=True)
class Setting:
    """One line of a help.

    Attributes:
        default: None if there is none to show.
        kind: what its value is: ``FILE``, ``FOLDER``, ``MODEL``, ``N``, ``X``, ``TEXT``, or ``SWITCH``.
        choices: the values that it can have, if they are a few.
        several: whether it takes several values.
    """

    name: str
    text: str
    default: Any
    kind: str
    choices: tuple[str, ...] = ()
    required: bool = False
    several: bool = False


@dataclass(frozen=True)
class Group:
    """Settings under one title."""

    title: str
    settings: list[Setting]


def groups_of(command: Command) -> list[Group]:
    """What the help of ``command`` lists, in its order."""
    found = dict(_grouped(command.arguments))
    # Of the class that the others extend, so its fields come first.
    loading = found.pop(LOADING, [])
    if not command.trains:
        return [Group(title, settings) for title, settings in {**found, LOADING: loading}.items() if settings]
    drift, processes = found.pop(DRIFT), found.pop(PROCESSES)
    found = {MODEL_AND_DATA: found.pop(MODEL_AND_DATA), LOADING: loading, **found}
    found |= {
        "constraint": _prefixed(ProConSettings),
        DRIFT: drift,
    }
    for title, settings in _grouped(ShownTrainingArguments):
        found[title] = [*found.get(title, []), *settings]
    found[PROCESSES] = processes
    return [Group(title, settings) for title, settings in found.items() if settings]


def _grouped(own: type[Any]) -> Iterator[tuple[str, list[Setting]]]:
    """Settings by their titles, the titles in the order in which they first occur."""
    hints = get_type_hints(own)
    found: dict[str, list[Setting]] = {}
    for field in fields(own):
        if field.init:
            title = field.metadata.get("group") or "settings"
            found.setdefault(title, []).append(_setting(field, hints[field.name], field.metadata["help"]))
    return iter(found.items())


def _prefixed(own: type[Any]) -> list[Setting]:
    """The ``procon_`` settings of a dataclass in :mod:`procon.settings`."""
    hints = get_type_hints(own)
    return [_setting(field, hints[field.name], field.metadata["help"], prefix="procon_") for field in fields(own)]


def _setting(field: Field[Any], hint: Any, text: str, prefix: str = "") -> Setting:
    name = prefix + field.name
    required = field.default is MISSING and field.default_factory is MISSING
    default = None if required or field.default is MISSING else field.default
    kind, choices, several = _kind(name, hint)
    if prefix:
        choices = CHOICES.get(field.name, ())
    return Setting(name, text, default, kind, choices, required, several)


def kind_of(command: Command, name: str) -> tuple[str, tuple[str, ...], bool]:
    """What the value of a command's own setting is, its choices, and whether there are several."""
    return _kind(name, get_type_hints(command.arguments)[name])


def _kind(name: str, hint: Any) -> tuple[str, tuple[str, ...], bool]:
    """What the value is, its choices, and whether there are several, by name and type."""
    if get_origin(hint) in (Union, types.UnionType):
        hint = next((part for part in get_args(hint) if part is not type(None)), str)
    if several := get_origin(hint) is list:
        (hint,) = get_args(hint)
    choices = get_args(hint) if get_origin(hint) is Literal else ()
    if hint is bool:
        return "SWITCH", (), several
    for kind, names in {"FILE": _FILES, "FOLDER": _FOLDERS, "MODEL": _MODELS}.items():
        if name in names:
            return kind, (), several
    return {int: "N", float: "X"}.get(hint, "TEXT"), choices, several


def build_parser(name: str, command: Command, *, parser: argparse.ArgumentParser | None = None) -> Any:
    """A parser that knows each setting by one spelling. It is for showing and completing: it checks little."""
    parser = parser or argparse.ArgumentParser(add_help=False)
    parser.prog = f"procon {name}"
    parser.usage = f"procon {name} {usage(command)}"
    parser.description = command.arguments.__doc__
    parser.epilog = f"{_NOTES} {_TRAINING_NOTE}" if command.trains else _NOTES
    parser.formatter_class = _Formatter
    for group in groups_of(command):
        section = parser.add_argument_group(group.title)
        for setting in group.settings:
            _add(section, setting)
    others = parser.add_argument_group("other")
    _add(others, Setting("config", "Settings by name.", None, "FILE"))
    others.add_argument("-h", "--help", action="store_true", help="Show this and leave.")
    return parser


def usage(command: Command) -> str:
    """How the words before the first flag are written."""
    several = {field.name for field in fields(command.arguments) if "list" in str(field.type)}
    required = {field.name for field in fields(command.arguments) if field.default is MISSING}
    words = [name.upper().removesuffix("S") + "..." if name in several else name.upper() for name in command.positional]
    shown = [word if name in required else f"[{word}]" for name, word in zip(command.positional, words, strict=True)]
    return " ".join([*shown, "[settings]"])


def _add(section: Any, setting: Setting) -> None:
    text = setting.text
    if setting.required:
        text += " (required)"
    elif setting.default is not None and setting.default is not False:
        text += f" (default: {setting.default})"
    values: dict[str, Any] = {"metavar": "{" + ",".join(setting.choices) + "}" if setting.choices else setting.kind}
    if setting.kind == "SWITCH":
        values = {"nargs": "?", "metavar": "{true,false}"}
    elif setting.several:
        values["nargs"] = "+"
    action = section.add_argument(f"--{setting.name}", help=text.replace("%", "%%"), **values)
    action.choices = ("true", "false") if setting.kind == "SWITCH" else setting.choices or None  # for completion


class _Formatter(argparse.HelpFormatter):
    """As wide as the terminal, at most 110 columns: longer lines are hard to read."""

    def __init__(self, prog: str, **settings: Any) -> None:
        columns = shutil.get_terminal_size(fallback=(100, 24)).columns
        super().__init__(prog, **{**settings, "max_help_position": 34, "width": max(60, min(columns, 110)) - 2})


def help_of(name: str) -> str:
    """The text of ``procon NAME --help``."""
    return build_parser(name, COMMANDS[name]).format_help()
