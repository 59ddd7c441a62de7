"""The ``procon`` command: parses arguments from flags or a YAML file, and turns bad input into one line."""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn, TextIO

import yaml

from procon.cli import arguments
from procon.errors import ProConError, printable, visible
from procon.settings import PAPER_RECIPE
from procon.version import __version__

# torch and transformers are imported by the command that runs, not here: `procon --help` must come at once.

#: Of the many TrainingArguments, those that `procon train --help` shows; all are accepted.
_SHOWN_TRAINING_ARGUMENTS = {
    "output_dir",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "logging_steps",
    "save_strategy",
    "save_steps",
    "save_total_limit",
    "seed",
    "report_to",
}

#: The paper's recipe (section IV-A2) and quiet defaults, as far as TrainingArguments' own differ.
_TRAINING_DEFAULTS = {
    "output_dir": "procon-output",
    "learning_rate": PAPER_RECIPE.learning_rate,
    "logging_steps": 10,
    "report_to": "none",
}


@dataclass(frozen=True)
class Command:
    """One subcommand: its own arguments, and where the function that takes them is.

    Attributes:
        trains: whether the function takes a ProConConfig as well.
    """

    arguments: type[Any]
    module: str
    function: str
    trains: bool = False

    def argument_types(self) -> tuple[type[Any], ...]:
        """The dataclasses that the command line is parsed into."""
        return (self.arguments, import_module("procon.training").ProConConfig) if self.trains else (self.arguments,)

    def run(self, *parsed: object) -> None:
        getattr(import_module(self.module), self.function)(*parsed)


COMMANDS = {
    "quickstart": Command(arguments.QuickstartArguments, "procon.cli.commands", "quickstart"),
    "directions": Command(arguments.DirectionsArguments, "procon.cli.commands", "directions"),
    "train": Command(arguments.TrainArguments, "procon.cli.train", "train", trains=True),
    "drift": Command(arguments.DriftArguments, "procon.cli.commands", "drift"),
    "eval": Command(arguments.EvalArguments, "procon.cli.commands", "evaluation"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, or 2 for bad input, reported in one line on standard error."""
    argv = list(sys.argv[1:] if argv is None else argv)
    with warnings.catch_warnings(), _visible_logs():
        warnings.showwarning = _show_warning
        return _main(argv)


@contextmanager
def _visible_logs() -> Iterator[None]:
    """Within the context, what libraries log of a model's own names has no commands to the terminal in it."""
    make = logging.getLogRecordFactory()

    def make_visible(*arguments: Any, **further: Any) -> logging.LogRecord:
        record = make(*arguments, **further)
        record.msg, record.args = visible(record.getMessage()), ()
        return record

    logging.setLogRecordFactory(make_visible)
    try:
        yield
    finally:
        logging.setLogRecordFactory(make)


def _main(argv: list[str]) -> int:
    if argv[:1] == ["--version"]:
        print(f"procon {__version__}")
        return 0
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview())
        return 0
    try:
        command = COMMANDS.get(argv[0])
        if command is None:
            raise ProConError(f"there is no command {argv[0]!r}: choose one of {', '.join(COMMANDS)}")
        try:
            command.run(*parse(argv[0], argv[1:]))
        except OSError as error:
            raise _from_system(error) from error
    except ProConError as error:
        # From a loader's worker the message comes back behind the worker's own traceback.
        text = str(error).rpartition("ProConError: ")[2]
        print(f"procon: error: {' '.join(text.split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("procon: interrupted", file=sys.stderr)
        return 130
    return 0


def _from_system(error: OSError) -> ProConError:
    """What the system refused, if no other check saw it coming."""
    what = f"{str(error.filename)!r} cannot be read or written" if error.filename else "the system refuses"
    return ProConError(f"{what} ({error.strerror or error or type(error).__name__}): change that and run it again")


def parse(name: str, argv: Sequence[str]) -> tuple[Any, ...]:
    """Instances of the argument dataclasses of command ``name``; flags win over ``--config FILE.yaml``.

    Raises:
        ProConError: for a setting that is unknown, missing or malformed, or an unreadable YAML file.
    """
    from transformers import HfArgumentParser

    command = COMMANDS[name]
    types = command.argument_types()
    epilog = "Settings may also stand in a YAML file, by the same names: --config FILE.yaml. Flags win over it."
    if command.trains:
        epilog += " All of transformers' TrainingArguments are accepted, not only those listed."
    parser = HfArgumentParser(
        types,  # pyright: ignore[reportArgumentType]  # it asks for a NewType of Any, which no class is
        prog=f"procon {name}",
        usage=f"procon {name} [settings]",
        description=types[0].__doc__,
        epilog=epilog,
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    if command.trains:
        parser.set_defaults(**_TRAINING_DEFAULTS)
        _hide_rare_arguments(parser, command.arguments)
    _leave_choices_to_settings(parser, command.arguments)
    parser.add_argument("--config", metavar="FILE.yaml", help="Settings by name.")
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")

    def refuse(message: str) -> NoReturn:
        raise ProConError(f"{message}; see 'procon {name} --help'")

    parser.error = first.error = refuse  # argparse's own also prints the usage, and exits
    file = first.parse_known_args(argv)[0].config
    given = {flag.partition("=")[0][2:].replace("-", "_") for flag in argv if flag.startswith("--")}
    if file:
        given |= _apply_yaml(parser, Path(file), types)
    try:
        *parsed, unknown = parser.parse_args_into_dataclasses(
            args=list(argv), look_for_args_file=False, return_remaining_strings=True
        )
    except ProConError:
        raise
    except Exception as error:  # TrainingArguments checks some settings itself, and trips over others
        raise ProConError(f"{error or type(error).__name__}; see 'procon {name} --help'") from error
    if unknown:
        raise ProConError(f"there is no setting {unknown[0]!r}{_hint(unknown[0], _names(parser))}")
    if command.trains:
        import_module("procon.cli.training_numbers").check(parsed[1])
        parsed[0].given = frozenset(given)
    return tuple(parsed[: len(types)])


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the default, if any."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def _names(parser: argparse.ArgumentParser) -> set[str]:
    return {action.dest for action in parser._actions} - {"help", "config"}


def _hint(unknown: str, known: set[str]) -> str:
    close = get_close_matches(unknown.split("=")[0].lstrip("-").replace("-", "_"), known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ": see --help for the names"


class _SettingsLoader(yaml.BaseLoader):
    """Every scalar as it is written, for argparse to read as it reads flags: YAML itself reads 2e-4 as a text and
    ``save_strategy: no`` for a false. A key that is given twice is an error: otherwise the last one would win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for name, mark in [(key.value, key.start_mark) for key, _ in node.value if isinstance(key, yaml.ScalarNode)]:
            if name in seen:
                raise yaml.MarkedYAMLError(None, None, f"{name!r:.60} is given twice", mark)
            seen.add(name)
        return super().construct_mapping(node, deep)

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):  # a few of them within each other stand for more than memory holds
            raise yaml.MarkedYAMLError(None, None, "aliases are not read", self.peek_event().start_mark)
        return super().compose_node(parent, index)


def _read_yaml(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings as they are written, and as YAML reads them."""
    try:
        text = file.read_text(encoding="utf-8")
        written = yaml.load(text, Loader=_SettingsLoader) or {}  # noqa: S506  # it builds texts alone
        read = yaml.safe_load(text) or {}
    except FileNotFoundError:
        raise ProConError(f"config file {str(file)!r} does not exist: check the path") from None
    except Exception as error:  # PyYAML has errors of its own, and lets through those of Python's types
        raise ProConError(
            f"config file {str(file)!r} cannot be read as YAML: {error or type(error).__name__}"
        ) from error
    if not isinstance(written, dict) or not isinstance(read, dict):
        raise ProConError(f"config file {str(file)!r} holds no 'name: value' lines: write one setting per line")
    return written, read


def _apply_yaml(parser: argparse.ArgumentParser, file: Path, types: tuple[type[Any], ...]) -> set[str]:
    """Make the file's settings the parser's defaults; returns their names."""
    settings, nested = _read_yaml(file)
    known = _names(parser)
    for name in settings:
        if name not in known:
            raise ProConError(
                f"config file {str(file)!r} has the unknown setting {name!r:.60}{_hint(str(name), known)}"
            )
    # Of the classes, as the parser has simplified the types of their fields.
    classes = [parent for own in types for parent in own.__mro__ if is_dataclass(parent)]
    mappings = {name for parent in classes for name, kind in parent.__annotations__.items() if "dict" in str(kind)}
    for action in parser._actions:
        value = settings.get(action.dest)
        if value is None or nested.get(action.dest) is None:
            continue
        if isinstance(value, dict) and action.dest in mappings:
            value = nested[action.dest]
        elif isinstance(value, list) and all(isinstance(item, str) for item in value):
            value = value if action.nargs == "+" else ",".join(value)
        elif not isinstance(value, str):
            raise ProConError(f"config file {str(file)!r} gives {action.dest} a {type(value).__name__}: give one value")
        elif action.nargs == "+":
            value = [value]
        action.default = value
        action.required = False
    return set(settings)


def _leave_choices_to_settings(parser: argparse.ArgumentParser, own: type[Any]) -> None:
    """Of our settings the help lists the choices, and the settings' own check refuses others, as it does in YAML."""
    ours = {field.name for field in fields(own)}
    for action in parser._actions:
        if action.choices is not None and (action.dest in ours or action.dest.startswith("procon_")):
            action.metavar = "{" + ",".join(map(str, action.choices)) + "}"
            action.choices, action.type = None, str


def _hide_rare_arguments(parser: argparse.ArgumentParser, shown: type[Any]) -> None:
    listed = {field.name for field in fields(shown)} | _SHOWN_TRAINING_ARGUMENTS
    for action in parser._actions:
        if action.dest not in listed and not action.dest.startswith("procon_") and action.dest != "help":
            action.help = argparse.SUPPRESS


def _overview() -> str:
    lines = [
        "usage: procon COMMAND [settings]",
        "",
        "Fine-tune a chat model without it forgetting how to refuse.",
        "",
        "commands:",
    ]
    lines += [f"  {name:<12}{command.arguments.__doc__}" for name, command in COMMANDS.items()]
    lines += ["", "Begin with `procon quickstart`. Each command explains its settings: procon COMMAND --help"]
    return "\n".join(lines)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    if issubclass(category, UserWarning) and not issubclass(category, (FutureWarning, DeprecationWarning)):
        print(f"procon: warning: {' '.join(printable(str(message)).split())}", file=sys.stderr)
