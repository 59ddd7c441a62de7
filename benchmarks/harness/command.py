"""The command line of what runs a study or writes its page."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

from transformers import HfArgumentParser

from procon.errors import ProConError

_Arguments = TypeVar("_Arguments")


def run_command(
    module: str, kind: type[_Arguments], act: Callable[[_Arguments], None], argv: Sequence[str] | None
) -> int:
    """Do ``act`` with the arguments that are given; a ProConError is one line, and the exit status 2.

    Args:
        module: run by ``python -m``; its last part names the error.
        kind: a dataclass of arguments.
    """
    (arguments,) = HfArgumentParser(kind, prog=f"python -m {module}").parse_args_into_dataclasses(
        None if argv is None else list(argv)
    )
    try:
        act(arguments)
    except ProConError as error:
        print(f"{module.rpartition('.')[2]}: error: {error}", file=sys.stderr)
        return 2
    return 0
