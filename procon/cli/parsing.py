"""The ``procon`` command: parses arguments from flags or a YAML file, and turns bad input into one line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from procon.cli import contradictions, first_look
from procon.cli.evaluation import evaluation_defaults
from procon.cli.first_look import hint
from procon.cli.help import help_of, usage
from procon.cli.noise import others_apart
from procon.cli.registry import COMMANDS, Command
from procon.cli.training_arguments import OWN_DEFAULTS
from procon.errors import ProConError, require_extra
from procon.version import __version__

# torch and transformers are imported by the command that runs, not here: `procon --help` must come at once.


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, or 2 for bad input, reported in one line on standard error."""
    argv = list(sys.argv[1:] if argv is None else argv)
    with others_apart():
        return _main(argv)


def _main(argv: list[str]) -> int:
    if argv[:1] in (["--version"], ["-V"]):
        print(f"procon {__version__}")
        return 0
    if not argv or argv[0] in ("-h", "--help") or argv == ["help"]:
        print(_overview())
        return 0
    try:
        asked = argv[0] == "help"
        name, settings = (argv[1], []) if asked else (argv[0], argv[1:])
        command = _find_command(name)
        if asked or {"-h", "--help"} & set(settings):
            print(help_of(name), end="")
            return 0
        try:
            first_look.check(name, _with_flags(name, settings), files=find_spec("transformers") is not None)
            parsed = parse(name, settings)
            if command.trains:
                launcher = import_module("procon.cli.launcher")
                if launcher.asks_for_processes(parsed[0]):
                    return launcher.launch(parsed[0], settings, use_cpu=parsed[1].use_cpu)
            command.run(*parsed)
        except OSError as error:
            raise _from_system(error) from error
    except ProConError as error:
        # From a loader's worker the message comes back behind the worker's own traceback.
        text = str(error).rpartition("ProConError: ")[2]
        print(f"procon: error: {' '.join(text.split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print(": ".join(["procon: interrupted", *map(str, interrupt.args)]), file=sys.stderr)
        return 130
    return 0


def _find_command(name: str) -> Command:
    if name in COMMANDS:
        return COMMANDS[name]
    close = get_close_matches(name, COMMANDS, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else f": choose one of {', '.join(COMMANDS)}"
    raise ProConError(f"there is no command {name!r}{hint}")


def _from_system(error: OSError) -> ProConError:
    """What the system refused, if no other check saw it coming."""
    what = f"{str(error.filename)!r} cannot be read or written" if error.filename else "the system refuses"
    return ProConError(f"{what} ({error.strerror or error or type(error).__name__}): change that and run it again")


def full_parser(name: str) -> tuple[argparse.ArgumentParser, tuple[type[Any], ...]]:
    """The parser of command ``name``, and the dataclasses that it parses into."""
    from transformers import HfArgumentParser

    class Parser(HfArgumentParser):
        def add_argument(self, *names: Any, group: str = "", **settings: Any) -> argparse.Action:
            """Without the title, which is for the help."""
            return super().add_argument(*names, **settings)

    command = COMMANDS[name]
    types = command.argument_types()
    parser = Parser(
        types,  # pyright: ignore[reportArgumentType]  # it asks for a NewType of Any, which no class is
        prog=f"procon {name}",
        allow_abbrev=False,
    )
    if command.trains:
        parser.set_defaults(**OWN_DEFAULTS)
    _leave_choices_to_settings(parser, command.arguments)
    parser.add_argument("--config", metavar="FILE.yaml", help="Settings by name.")

    def refuse(message: str) -> NoReturn:
        raise ProConError(f"{message}; see 'procon {name} --help'")

    parser.error = refuse  # argparse's own also prints the usage, and exits
    return parser, types


def parse(name: str, argv: Sequence[str]) -> tuple[Any, ...]:
    """Instances of the argument dataclasses of command ``name``; flags win over ``--config FILE.yaml``.

    Words before the first flag are the command's positional settings.

    Raises:
        ProConError: for a setting that is unknown, missing or malformed, or an unreadable YAML file.
    """
    command = COMMANDS[name]
    require_extra("cli", f"procon {name}")
    argv = _with_flags(name, argv)
    first_look.check(name, argv)
    parser, types = full_parser(name)
    flags = [word for word in argv if word.startswith("--") and word != "--"]
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    first.error = parser.error
    file = first.parse_known_args(argv)[0].config
    given = {flag.partition("=")[0][2:].replace("-", "_") for flag in flags}
    if file:
        given |= _apply_yaml(parser, Path(file), types)
    if command.trains:
        parser.set_defaults(**evaluation_defaults(parser.parse_known_args(argv)[0], given))
    try:
        *parsed, unknown = parser.parse_args_into_dataclasses(  # pyright: ignore[reportAttributeAccessIssue]
            args=argv, look_for_args_file=False, return_remaining_strings=True
        )
    except ProConError:
        raise
    except Exception as error:  # TrainingArguments checks some settings itself, and trips over others
        raise ProConError(f"{error or type(error).__name__}; see 'procon {name} --help'") from error
    if unknown:
        raise ProConError(f"there is no setting {unknown[0]!r}{hint(unknown[0], _names(parser))}")
    if command.trains:
        import_module("procon.cli.training_numbers").check(parsed[1])
        parsed[0].given = frozenset(given)
        contradictions.check(parsed[0], parsed[1])
    return tuple(parsed[: len(types)])


def _with_flags(name: str, argv: Sequence[str]) -> list[str]:
    """``argv`` with a flag for each word before the first one."""
    command, rest = COMMANDS[name], list(argv)
    kinds = {field.name: str(field.type) for field in fields(command.arguments)}
    found: list[str] = []
    for setting in command.positional:
        count = 0
        while count < len(rest) and not rest[count].startswith("-") and (count == 0 or "list" in kinds[setting]):
            count += 1
        if count and any(word.partition("=")[0] in (f"--{setting}", f"--{setting.replace('_', '-')}") for word in rest):
            raise ProConError(f"{setting} is given twice, as {rest[0]!r} and by --{setting}: give one of them")
        found += [f"--{setting}", *rest[:count]] if count else []
        rest = rest[count:]
    if rest and not rest[0].startswith("-"):
        raise ProConError(f"{rest[0]!r} is one word too many: write procon {name} {usage(command)}")
    return found + rest


def _names(parser: argparse.ArgumentParser) -> set[str]:
    return {action.dest for action in parser._actions} - {"help", "config"}


def _apply_yaml(parser: argparse.ArgumentParser, file: Path, types: tuple[type[Any], ...]) -> set[str]:
    """Make the file's settings the parser's defaults; returns their names."""
    settings, nested = import_module("procon.cli.settings_file").read_settings(file)
    known = _names(parser)
    for name in settings:
        if name not in known:
            raise ProConError(f"config file {str(file)!r} has the unknown setting {name!r:.60}{hint(str(name), known)}")
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


def _overview() -> str:
    lines = [
        "usage: procon COMMAND [settings]",
        "",
        "Fine-tune a chat model without it forgetting how to refuse.",
        "",
        "commands:",
    ]
    lines += [f"  {name:<12}{command.arguments.__doc__}" for name, command in COMMANDS.items()]
    lines += ["", "Begin with `procon quickstart`. Each command explains its settings: procon help COMMAND"]
    return "\n".join(lines)
