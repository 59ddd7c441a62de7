"""A folder's files on every host of a process group, if hosts share no file system."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar, cast

import torch.distributed as dist

from procon.errors import ProConError
from procon.files import partial_path, whole_file, writing

T = TypeVar("T")

#: Bytes that are broadcast at a time; the exchange takes a few times as much memory.
PIECE_BYTES = 16 * 2**20


def own_rank() -> int:
    """This process in the process group; 0 if there is none."""
    return 0 if _one_process() else dist.get_rank()


def gather(value: T) -> list[T]:
    """``value`` of every rank, in their order; all ranks must call. One process alone gets its own."""
    if _one_process():
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
        if _one_process():
            raise
        error = str(raised)
    for message in gather(error):
        if message is not None:
            raise ProConError(message)
    return value


def once_per_host(folder: Path, action: Callable[[], T]) -> list[T]:
    """What ``action`` gives on each host: it runs in one rank of each file system that has a ``folder`` of its own.

    All ranks must call, and go on when all are done.

    Raises:
        ProConError: on all ranks, if it was raised on one.
    """
    first = _one_process() or _first_to_see(folder) == own_rank()
    found = gather(on_all_ranks(lambda: [action()] if first else []))
    return [value for values in found for value in values]


def share_files(folder: Path, pattern: str) -> None:
    """Give every file system of the process group the files of ``folder`` that any of them has; all ranks must call.

    The folder must exist everywhere, and may have another path on each rank. Files of one name are taken for the same.
    A file system that lacks one gets it once, whole or not at all. If all ranks see one folder, nothing is sent.

    Args:
        pattern: which files, as :meth:`pathlib.Path.glob` takes it.

    Raises:
        ProConError: on all ranks, if files of one name have different sizes.
    """
    if _one_process():
        return
    rank = dist.get_rank()
    hosts = sorted(set(gather(_first_to_see(folder))))
    if len(hosts) == 1:
        return
    sizes = gather({file.name: file.stat().st_size for file in folder.glob(pattern)} if rank in hosts else {})
    for name in sorted(set().union(*sizes)):
        owners = [host for host in hosts if name in sizes[host]]
        if len({sizes[owner][name] for owner in owners}) > 1:
            found = ", ".join(f"{sizes[owner][name]} on that of rank {owner}" for owner in owners)
            raise ProConError(
                f"the size of {name!r} in {str(folder)!r} depends on the host ({found}): delete it from all of them"
            )
        if owners == hosts:
            continue
        if rank == owners[0]:
            _send(folder / name)
        elif rank in hosts and rank not in owners:
            with whole_file(folder / name) as partial, partial.open("wb") as copy:
                copy.writelines(_receive(owners[0]))
        else:
            for _ in _receive(owners[0]):
                pass


def _one_process() -> bool:
    return not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1


def _first_to_see(folder: Path) -> int:
    """The lowest rank on this rank's file system: each leaves a mark in its ``folder``, and looks for the others'."""
    mark = partial_path(folder)

    def leave() -> None:
        with writing(folder):
            mark.mkdir()

    try:
        on_all_ranks(leave)
        first = next(rank for rank, name in enumerate(gather(mark.name)) if (folder / name).exists())
        gather(None)  # until all have looked
    finally:
        with suppress(OSError):  # it is then cleaned as what the dead leave is
            mark.rmdir()
    return first


def _send(file: Path) -> None:
    with file.open("rb") as stream:
        while piece := stream.read(PIECE_BYTES):
            dist.broadcast_object_list([piece], src=dist.get_rank())
    dist.broadcast_object_list([b""], src=dist.get_rank())


def _receive(owner: int) -> Iterator[bytes]:
    piece: list[Any] = [None]
    while piece[0] != b"":
        dist.broadcast_object_list(piece, src=owner)
        yield piece[0]
