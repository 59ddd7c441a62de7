"""Files and folders that are whole or not there, also after a power cut, and JSON in and out.

What is being written lies in a private folder beside its target. Uploads to a model hub leave out what begins with an
underscore.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from procon.errors import ProConError

T = TypeVar("T")

#: What safetensors, tokenizers and torch say of an error of the system.
_SYSTEM_ERROR = re.compile(r"\(os error \d+\)|PytorchStreamWriter|unexpected pos|iostream error")


@contextmanager
def writing(target: str | Path) -> Iterator[None]:
    """Within the context, what the system refuses to write is a ProConError that names ``target`` and the reason."""
    try:
        yield
    except ProConError:  # says it already
        raise
    except Exception as error:
        reason = error.strerror if isinstance(error, OSError) else _SYSTEM_ERROR.search(str(error)) and str(error)
        if not reason or isinstance(error, (ConnectionError, TimeoutError)):  # a network's
            raise
        raise ProConError(f"cannot write {str(target)!r} ({reason}): free some space, or give another place") from error


def check_writable(target: str | Path) -> Path:
    """The path; ProConError now, rather than after the work, if a file cannot be written there. Leaves nothing."""
    target = Path(target)
    if target.is_dir():
        raise ProConError(f"cannot write {str(target)!r}: it is a folder; give the name of a file")
    with writing(target), _private_folder(next(folder for folder in target.parents if folder.exists())):
        pass
    return target


@contextmanager
def whole_file(target: str | Path) -> Iterator[Path]:
    """Within the context, write to the path that it gives; after it, that is ``target``, which is whole or not there.

    It is on the disk before it is renamed into place. If the context ends in an error, an older ``target`` stays as it
    was. Several processes may write one target at a time: it is then that of the last one.
    The folder of ``target`` is made if need be. Raises as :func:`writing`.
    """
    target = Path(target)
    with writing(target), _private_folder(target.parent) as private:
        partial = private / target.name
        yield partial
        sync(partial)
        partial.replace(target)
        sync(target.parent)


@contextmanager
def whole_folder(target: str | Path) -> Iterator[Path]:
    """Within the context, fill the empty folder that it gives; after it, that is ``target``, whole or not there.

    If ``target`` is there by then and not empty, another process was faster: its folder stays, and this one is dropped.
    """
    target = Path(target)
    with writing(target), _private_folder(target.parent) as private:
        partial = private / target.name
        partial.mkdir()
        yield partial
        sync_files(partial)
        try:
            partial.rename(target)
        except OSError:
            if not (target.is_dir() and any(target.iterdir())):
                raise
        sync(target.parent)


def write_text(text: str, path: str | Path) -> Path:
    """Write ``text`` to ``path`` so that a reader finds the old file or the whole new one; returns the path."""
    return write_bytes(text.encode(), path)


def write_bytes(data: bytes, path: str | Path) -> Path:
    """Write ``data`` to ``path`` so that a reader finds the old file or the whole new one; returns the path."""
    with whole_file(path) as partial:
        partial.write_bytes(data)
    return Path(path)


def save_json(data: dict[str, Any], path: str | Path) -> Path:
    """Write ``data`` as standard JSON (NaN is an error) in one step; returns the path."""
    return write_text(json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n", path)


def json_checksum(data: dict[str, Any]) -> str:
    """16 hexadecimal digits of JSON content, whatever the order of its keys."""
    return hashlib.blake2b(json.dumps(data, sort_keys=True).encode(), digest_size=8).hexdigest()


def load_json(path: str | Path, build: Callable[[Any], T], what: str) -> T:
    """``build`` what :func:`save_json` wrote; ProConError, by the name ``what``, if it is missing or damaged."""
    if not os.path.isfile(path):
        raise ProConError(f"{what} file {str(path)!r} does not exist")
    try:
        return build(parse_json(Path(path).read_text(encoding="utf-8")))
    # What Python raises if content is not the one that was expected.
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        reason = f"no key {error}" if isinstance(error, KeyError) else error
        raise ProConError(f"{what} file {str(path)!r} is damaged or holds something else ({reason})") from error


def parse_json(text: str) -> Any:
    """What the JSON ``text`` holds; ValueError if it is none, nested too deep, or could not be written again."""
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair could not
    except RecursionError:
        raise ValueError("lists and objects are nested too deep") from None
    return value


@contextmanager
def _private_folder(parent: Path) -> Iterator[Path]:
    """An empty folder in ``parent`` that only this process knows, removed at the end with what is in it."""
    missing = [path for path in (parent, *parent.parents) if not path.exists()]
    parent.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync(path.parent)
    clean(parent)
    with TemporaryDirectory(prefix="_procon-", suffix=".partial", dir=parent, ignore_cleanup_errors=True) as private:
        yield Path(private)


def sync(path: Path) -> None:
    """Wait until a file, or the list of a folder's files, is on the disk."""
    if os.name != "posix":  # which opens no folder, and syncs no file that is open for reading
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # which some file systems cannot sync, of networks most of all
            raise
    finally:
        os.close(descriptor)


def sync_files(folder: Path) -> None:
    """Wait until all that is below a folder is on the disk, and its names."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def clean(parent: Path) -> None:
    """Remove what processes that died were writing in ``parent`` a day ago; whatever is written there does so first."""
    for path in parent.glob("_procon-*.partial"):
        with suppress(OSError):  # another process cleans too, or it may not
            if time.time() - path.lstat().st_mtime > 24 * 60 * 60:
                shutil.rmtree(path)
