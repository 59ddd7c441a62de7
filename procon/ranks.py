"""What the ranks of a process group tell each other, and what one finds out for all; one alone tells itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import torch.distributed as dist

from procon.errors import ProConError
from procon.files import write_bytes

T = TypeVar("T")


def are_ranks() -> bool:
    """Whether this process is one of a group."""
    return dist.is_available() and dist.is_initialized()


def is_main() -> bool:
    """Whether this process is the main one, or alone."""
    return not are_ranks() or dist.get_rank() == 0


def gather(value: T) -> list[T]:
    """``value`` of every rank, in their order; all ranks must call."""
    if not are_ranks():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def on_all_ranks(action: Callable[[], T]) -> T:
    """What ``action`` gives here, once all ranks are done with theirs; all must call.

    Raises:
        ProConError: on all ranks, if it was raised on one. None is left waiting for it.
    """
    value, error = cast(T, None), None
    try:
        value = action()
    except ProConError as raised:
        error = str(raised)
    for message in gather(error):
        if message is not None:
            raise ProConError(message)
    return value


def on_main(call: Callable[[], T], *, all_call: bool = False) -> T:
    """What ``call`` gives on the main process, on every rank; all ranks must ask.

    Args:
        all_call: every rank calls, as one that needs the others' shards of a model has to, and takes the main one's.

    Raises:
        ProConError: on every rank, if the main process raises it.
    """
    found: list[Any] = [None]
    if all_call or is_main():
        try:
            found = [call()]
        except ProConError as error:
            found = [error]
    if are_ranks():
        dist.broadcast_object_list(found)
    if isinstance(found[0], ProConError):
        raise found[0]
    return found[0]


def share_files(folder: Path) -> None:
    """Give every rank's ``folder`` the files that any rank's has; all ranks must call.

    If all ranks see one folder, as on one host or a shared disk, there is nothing to send.
    """
    if not are_ranks():
        return
    gather(None)  # until all have written theirs
    held = gather({path.name for path in folder.glob("[!_]*")})
    for name in sorted(set().union(*held)):
        owner = next(rank for rank, names in enumerate(held) if name in names)
        if all(name in names for names in held):
            continue
        content = [(folder / name).read_bytes() if dist.get_rank() == owner else b""]
        dist.broadcast_object_list(content, src=owner)
        lacks = name not in held[dist.get_rank()]
        on_all_ranks(lambda: write_bytes(content[0], folder / name) if lacks else None)  # noqa: B023
