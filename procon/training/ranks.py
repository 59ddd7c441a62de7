"""What one rank finds out for all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from procon.errors import ProConError

_Value = TypeVar("_Value")


def on_main(call: Callable[[], _Value]) -> _Value:
    """What ``call`` gives on the main process, on every rank; all ranks must ask.

    Raises:
        ProConError: on every rank, if the main process raises it.
    """
    found: list[Any] = [None]
    if PartialState().is_main_process:
        try:
            found = [call()]
        except ProConError as error:
            found = [error]
    broadcast_object_list(found)
    if isinstance(found[0], ProConError):
        raise found[0]
    return found[0]
