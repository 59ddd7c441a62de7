"""What one rank finds out for all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from procon.errors import ProConError

_Value = TypeVar("_Value")


def on_main(call: Callable[[], _Value], *, all_call: bool = False) -> _Value:
    """What ``call`` gives on the main process, on every rank; all ranks must ask.

    Args:
        all_call: every rank calls, as one that needs the others' shards of a model has to, and takes the main one's.

    Raises:
        ProConError: on every rank, if the main process raises it.
    """
    found: list[Any] = [None]
    if all_call or PartialState().is_main_process:
        try:
            found = [call()]
        except ProConError as error:
            found = [error]
    broadcast_object_list(found)
    if isinstance(found[0], ProConError):
        raise found[0]
    return found[0]
