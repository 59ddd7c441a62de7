"""Checkpoints that are known to be whole: each file of them has its size and checksum in the record, written last."""

from __future__ import annotations

import logging
import shutil
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from procon.errors import ProConError
from procon.files import sync
from procon.method.record import RECORD, read_record, write_record

logger = logging.getLogger(__name__)

#: Bytes that are read at a time.
_PIECE = 16 * 2**20

#: Endings of the files that weights, states and lists of them are in.
_LOADED = (".safetensors", ".bin", ".pt", ".pth", ".distcp", ".index.json")

#: Written last by the Trainer itself, and read first when a training goes on.
_TRAINER_STATE = "trainer_state.json"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of which every file was found to be as it was written.

    Attributes:
        path: its folder.
        record: what its ``procon.json`` holds.
    """

    path: Path
    record: dict[str, Any]

    def __str__(self) -> str:
        return f"checkpoint {str(self.path)!r}"


def seal(folder: Path, record: dict[str, Any]) -> None:
    """Declare a checkpoint whole: wait until its files are on the disk, then write the record with their checksums.

    Every rank must have written its own by now.
    """
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            sync(path)
        elif path.name != RECORD:
            files[path.relative_to(folder).as_posix()] = _checksum(path)
            sync(path)
    sync(folder)
    sync(folder.parent)
    write_record(folder, {**record, "files": files})


def break_seal(folder: Path) -> None:
    """Declare a checkpoint not whole, before it is written again."""
    record = folder / RECORD
    shutil.rmtree(record) if record.is_dir() else record.unlink(missing_ok=True)


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in ``path``, every file of which is read once.

    Raises:
        ProConError: if it is not whole or damaged, naming the file, was saved without what resuming needs, or holds
            weights that it was not saved with.
    """
    found = _whole(path)
    check_no_others(path, found.record["files"])
    return found


def _whole(path: Path) -> Checkpoint:
    record = read_record(path)
    files = (record or {}).get("files")
    if record is None or not isinstance(files, dict) or _TRAINER_STATE not in files:
        raise ProConError(f"{str(path)!r} is not a complete checkpoint: resume from another, or start afresh")
    if not record.get("resumable"):
        raise ProConError(
            f"checkpoint {str(path)!r} was saved without the optimiser's state (save_only_model), so training would "
            "not go on as it was: start afresh, and save with save_only_model=False"
        )
    check_files(path, files)
    return Checkpoint(path, record)


def check_files(folder: Path, files: dict[str, str], beginning: str | tuple[str, ...] = "") -> None:
    """Raise ProConError unless those of a checkpoint's files whose names begin so are as they were written."""
    for name, expected in files.items():
        if not name.startswith(beginning):
            continue
        file = folder / name
        try:
            found = _checksum(file) if file.is_file() else None
        except OSError as error:
            raise ProConError(f"checkpoint file {str(file)!r} cannot be read ({error}): resume from another") from error
        if found != expected:
            what = "is missing" if found is None else "is not as it was written"
            raise ProConError(f"checkpoint file {str(file)!r} {what}: resume from another checkpoint, or start afresh")


def check_no_others(folder: Path, files: dict[str, str]) -> None:
    """Raise ProConError for weights that are not of the checkpoint: they may be read before those that are."""
    for path in sorted(folder.rglob("*")):
        if path.name.endswith(_LOADED) and path.relative_to(folder).as_posix() not in files:
            raise ProConError(
                f"file {str(path)!r} was put there after the checkpoint was saved, and may be loaded in place of its "
                "weights: move it to a folder of its own"
            )


def latest(output_dir: Path) -> Checkpoint | None:
    """The latest whole checkpoint under ``output_dir``; a warning names each later one, and what is wrong with it.

    Raises:
        ProConError: if it was saved without what resuming needs, or holds weights that it was not saved with.
    """
    for path in reversed(_folders(output_dir)):
        try:
            found = _whole(path)
        except ProConError as error:
            if _is_whole_but_for_the_optimiser(path):
                raise
            logger.warning("passed over %s: %s", path.name, error)
        else:
            check_no_others(path, found.record["files"])
            return found
    return None


def has_checkpoints(output_dir: Path) -> bool:
    """Whether there is one that was written to its end."""
    return any(_was_whole(path) for path in _folders(output_dir))


def delete_superseded(checkpoint: Checkpoint, limit: int | None) -> None:
    """Of those before the one that a training goes on from, keep what ``limit`` leaves room for.

    A run may have been killed as it deleted them.
    """
    folders = _folders(checkpoint.path.parent)
    if limit is None or limit < 1 or checkpoint.path not in folders:
        return
    before = folders[: folders.index(checkpoint.path)]
    for path in before[: max(0, len(before) + 1 - limit)]:
        shutil.rmtree(path, ignore_errors=True)


def _folders(output_dir: Path) -> list[Path]:
    """By step."""
    found = [path for path in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.split("-")[-1].isdigit()]
    return sorted(found, key=lambda path: int(path.name.split("-")[-1]))


def _was_whole(path: Path) -> bool:
    try:
        record = read_record(path)
    except ProConError:
        return True
    # The plain Trainer leaves no record, and its state last.
    return "files" in record if record is not None else (path / _TRAINER_STATE).exists()


def _is_whole_but_for_the_optimiser(path: Path) -> bool:
    try:
        record = read_record(path)
    except ProConError:
        return False
    return record is not None and "files" in record and not record.get("resumable")


def _checksum(path: Path) -> str:
    """Size and CRC-32: against what disks, copies and crashes do to a file, not against an attacker."""
    size = crc = 0
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            size += len(piece)
            crc = zlib.crc32(piece, crc)
    return f"{size}-{crc:08x}"
