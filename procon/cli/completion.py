"""``procon completion``: a shell's own script, so that TAB completes commands, settings, their values and files."""

from __future__ import annotations

import argparse
from typing import Any

from procon.cli.arguments import CompletionArguments
from procon.cli.help import build_parser, kind_of
from procon.cli.registry import COMMANDS
from procon.errors import require_extra


def completion(arguments: CompletionArguments) -> None:
    """``procon completion``"""
    require_extra("completion", "procon completion")
    import shtab

    print(shtab.complete(_parser(shtab.FILE, shtab.DIRECTORY), shell=arguments.shell))


def _parser(file: Any, folder: Any) -> argparse.ArgumentParser:
    """All commands, with what completes each value."""
    offered = {"FILE": file, "FOLDER": folder, "MODEL": folder}
    parser = argparse.ArgumentParser("procon", add_help=False)
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("-V", "--version", action="store_true")
    commands = parser.add_subparsers()
    for name, command in COMMANDS.items():
        help_ = " ".join((command.arguments.__doc__ or "").split())
        sub = build_parser(name, command, parser=commands.add_parser(name, help=help_, add_help=False))
        for action in sub._actions:
            if action.metavar in offered:
                action.complete = offered[action.metavar]
        for setting in command.positional:
            kind, choices, several = kind_of(command, setting)
            word = sub.add_argument(setting, nargs="*" if several else "?", choices=choices or None)
            if kind in offered:
                word.complete = offered[kind]
    asked = commands.add_parser("help", help="Explain a command.", add_help=False)
    asked.add_argument("command", nargs="?", choices=list(COMMANDS))
    return parser
