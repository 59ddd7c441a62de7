"""Fields of the argument dataclasses: a default or none, a sentence for ``--help``, and the title that it is under."""

from __future__ import annotations

from dataclasses import field
from typing import Any, TypeVar

from procon.errors import ProConError

_Default = TypeVar("_Default")


def option(default: _Default, text: str, group: str = "") -> _Default:
    """A setting that may be left out."""
    return field(default=default, metadata={"help": text, "group": group})


def required(text: str, group: str = "") -> Any:
    """A setting that may not."""
    return field(metadata={"help": text, "group": group})


def check_least(least: int, arguments: object, *names: str) -> None:
    """Raise ProConError if one of these settings is below ``least``."""
    for name in names:
        if getattr(arguments, name) < least:
            raise ProConError(f"{name} is {getattr(arguments, name)}: give {least} or more")
