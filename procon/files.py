"""Files and folders that are whole or not there, also after a power cut, and JSON in and out.

What is being written lies in a private folder beside its target, ``_<machine>-<process>-<token>.partial``. Only its
owner may enter it, nobody can guess its name, and whatever a library writes on the way lies in it too. Uploads to a
model hub leave out what begins with an underscore.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from procon.errors import ProConError

T = TypeVar("T")

_PARTIAL = re.compile(r"_([0-9a-f]{8})-([0-9]+)-[0-9a-f]{16}\.partial")

#: Seconds after which what a process of another machine was writing is taken for left behind.
_ABANDONED = 24 * 60 * 60

#: Lists and objects within each other, and characters of one text, that a JSON, JSONL or CSV file may have.
MAX_NESTING = 64
MAX_TEXT = 1_000_000

#: What Python raises if content that was read is not the one that was expected.
NO_SUCH_CONTENT = (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError)

_STRING = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
_HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")

#: What the user can do, by the reason for which the system refused to write.
_REMEDIES = {
    errno.ENOSPC: "free some space, or give another place",
    errno.EDQUOT: "free some space, or give another place",
    errno.EFBIG: "give a place that takes files of this size",
    errno.EROFS: "give a place that can be written to",
    errno.EACCES: "give a place that you may write to",
    errno.EPERM: "give a place that you may write to",
    errno.ENOTDIR: "a part of the path is a file; give another path",
    errno.EEXIST: "a file is in the way; move it, or give another path",
    errno.ENOTEMPTY: "a folder is in the way; move it, or give another path",
    errno.EISDIR: "a folder is in the way; give the name of a file",
    errno.ENAMETOOLONG: "give a shorter path",
    errno.ELOOP: "links lead round in a circle; give another path",
    errno.EIO: "the disk reports an error; give a place on another one",
    errno.ESTALE: "the file system was mounted again; retry",
    errno.EMFILE: "the process has too many open files; raise the limit with 'ulimit -n'",
    errno.ENFILE: "the system has too many open files; close some",
}


@contextmanager
def writing(target: str | Path) -> Iterator[None]:
    """Within the context, what the system refuses to write ends in a ProConError: it names ``target`` and the reason.

    Raises:
        ProConError: if the disk is full or read-only, a folder is a file, and the like.
    """
    try:
        yield
    except Exception as error:
        reason = _reason(error)
        if reason is None or reason.errno not in _REMEDIES:  # a network's, for example
            raise
        raise _refused(target, reason) from error


def _reason(error: Exception) -> OSError | None:
    """The system's error, also if a library that writes by itself raises one of its own in its place."""
    if isinstance(error, OSError):
        return error
    if number := re.search(r"\(os error (\d+)\)", str(error)):  # safetensors, tokenizers
        return OSError(int(number[1]), os.strerror(int(number[1])))
    if isinstance(error, RuntimeError) and re.search("PytorchStreamWriter|unexpected pos|iostream error", str(error)):
        return OSError(errno.ENOSPC, "torch wrote a part of it, and gives no reason")
    return None


def _refused(target: str | Path, error: OSError) -> ProConError:
    remedy = _REMEDIES.get(error.errno or 0, "give another place")
    return ProConError(f"cannot write {str(target)!r} ({error.strerror or error}): {remedy}")


def check_writable(target: str | Path) -> None:
    """Raise ProConError now, rather than after the work, unless the file ``target`` can be written.

    Leaves nothing behind. Of a folder, ask for any file in it.
    """
    target = Path(target)
    try:
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        there = next(folder for folder in target.parents if folder.exists())
        if there != target.parent and not there.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        with _private_folder(there):
            pass
    except OSError as error:
        raise _refused(target, error) from error


@contextmanager
def whole_file(target: str | Path) -> Iterator[Path]:
    """Within the context, write to the path that it gives; after it, that is ``target``, which is whole or not there.

    It is on the disk before it is renamed into place. If the context ends in an error, an older ``target`` stays as it
    was. Several processes may write one target at a time: it is then that of the last one.

    Args:
        target: its folder is made if need be.

    Raises:
        ProConError: if the system refuses to write; see :func:`writing`.
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

    Raises:
        ProConError: if the system refuses to write; see :func:`writing`.
    """
    target = Path(target)
    with writing(target), _private_folder(target.parent) as private:
        partial = private / target.name
        partial.mkdir()
        yield partial
        for folder, _, _ in os.walk(partial, topdown=False):
            sync_files(Path(folder))
        try:
            partial.rename(target)
        except OSError as error:
            if not (error.errno in (errno.ENOTEMPTY, errno.EEXIST) and target.is_dir()):
                raise
        sync(target.parent)


def write_text(text: str, path: str | Path) -> Path:
    """Write ``text`` to ``path`` so that a reader finds the old file or the whole new one; returns the path."""
    return write_bytes(text.encode(), path)


def write_bytes(data: bytes, path: str | Path) -> Path:
    """Write ``data`` to ``path`` so that a reader finds the old file or the whole new one; returns the path."""
    path = Path(path)
    with whole_file(path) as partial:
        partial.write_bytes(data)
    return path


def save_json(data: dict[str, Any], path: str | Path) -> Path:
    """Write ``data`` as standard JSON (NaN is an error) in one step; returns the path."""
    return write_text(json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n", path)


def json_checksum(data: dict[str, Any]) -> str:
    """16 hexadecimal digits of JSON content, whatever the order of its keys."""
    return hashlib.blake2b(json.dumps(data, sort_keys=True).encode(), digest_size=8).hexdigest()


def load_json(path: str | Path, build: Callable[[Any], T], what: str) -> T:
    """``build`` what :func:`save_json` wrote; ``what`` names it in messages.

    Raises:
        ProConError: if the file is missing or damaged, or ``build`` does not recognise its content.
    """
    path = Path(path)
    if not os.path.isfile(path):
        raise ProConError(f"{what} file {str(path)!r} does not exist")
    try:
        return build(parse_json(path.read_text(encoding="utf-8")))
    except NO_SUCH_CONTENT as error:
        reason = f"no key {error}" if isinstance(error, KeyError) else error
        raise ProConError(f"{what} file {str(path)!r} is damaged or holds something else ({reason})") from error


def partial_path(folder: Path) -> Path:
    """A name in ``folder`` that nobody can guess; what is left of it if the process dies is cleaned later."""
    return folder / f"_{_machine()}-{os.getpid()}-{secrets.token_hex(8)}.partial"


@contextmanager
def _private_folder(parent: Path) -> Iterator[Path]:
    """An empty folder in ``parent`` that only this process knows, removed at the end with what is in it."""
    _make_folder(parent)
    clean(parent)
    private = partial_path(parent)
    private.mkdir(mode=0o700)
    try:
        yield private
    finally:
        shutil.rmtree(private, ignore_errors=True)


def _make_folder(folder: Path) -> None:
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file, or the list of a folder's files, is on the disk."""
    if os.name != "posix" and path.is_dir():  # cannot be opened there
        return
    # Others than POSIX sync only what is open for writing.
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems, of networks most of all, cannot sync folders.
        if not (error.errno in (errno.EINVAL, errno.ENOTSUP, errno.EBADF) and path.is_dir()):
            raise
    finally:
        os.close(descriptor)


def sync_files(folder: Path) -> None:
    """Wait until the files of a folder are on the disk, and their names."""
    for path in folder.iterdir():
        if path.is_file():
            sync(path)
    sync(folder)


def clean(parent: Path) -> None:
    """Remove what processes that are gone were writing in ``parent``; whatever is written there does so first."""
    for path in parent.glob("_*.partial"):
        match = _PARTIAL.fullmatch(path.name)
        # Whatever goes wrong, another process cleans too, or may not.
        with suppress(OSError):
            if match and _is_left_behind(path, machine=match[1], process=int(match[2])):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _is_left_behind(path: Path, machine: str, process: int) -> bool:
    if machine != _machine() or os.name != "posix":  # where the signal 0 would be one
        return time.time() - path.lstat().st_mtime > _ABANDONED
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:  # another user's
        pass
    return False


@cache
def _machine() -> str:
    """Names where process numbers mean the same: this host since it was started, this container."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return hashlib.blake2b("".join(parts).encode(), digest_size=4).hexdigest()


def parse_json(text: str) -> Any:
    """What the JSON ``text`` holds, if it is in order and not made to break its reader.

    Raises:
        ValueError: if it is no JSON, nested more than :data:`MAX_NESTING` levels deep, or has a number or a text that
            Python cannot hold.
    """
    if text.count("[") + text.count("{") > MAX_NESTING and _nesting(text) > MAX_NESTING:
        raise ValueError(f"lists and objects are nested more than {MAX_NESTING} levels deep")
    value = json.loads(text, parse_int=_integer)
    if _HALF_PAIR.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("a text has half of a surrogate pair, such as \\ud800") from None
    return value


def _nesting(text: str) -> int:
    """Levels of lists and objects within each other, up to where ``text`` ceases to be JSON."""
    level = deepest = 0
    for bracket in re.sub(r"[^\[\]{}]+", "", _STRING.sub("", text)):
        level += 1 if bracket in "[{" else -1
        deepest = max(deepest, level)
    return deepest


def _integer(digits: str) -> int:
    if len(digits) > 4300:  # Python's own limit, whose error speaks of Python's settings
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)
