"""What a disk may hold after the power went: from a journal of calls, the states that they can leave behind.

A file's contents are safe once it has been synced, a name once its folder has. What was not may be there or not, and in
any order: each of :data:`STATES` is one way in which a file system may lose it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

#: How much of what was not synced survives.
STATES = {
    "nothing": "no name, no contents",
    "names": "all names, no contents: files of zero length under their final names",
    "torn": "all names, half of the contents",
    "last name": "of the names the last one alone, no contents",
}


@dataclass
class Call:
    """A call: what it did, on which paths relative to the root, and the bytes that it wrote.

    Attributes:
        offset: where it wrote; of a truncation, the new length.
        flags: of an opening, 1 if it made the file and 2 if it emptied it; below 0, the error that the call ended with.
    """

    kind: str
    rank: int
    path: str
    other: str
    offset: int
    flags: int
    data: bytes = b""

    def __str__(self) -> str:
        names = {"o": "open", "w": "write", "t": "truncate", "s": "sync", "r": "rename", "l": "link"}
        names |= {"u": "unlink", "d": "mkdir", "x": "rmdir", "y": "symlink"}
        failed = f" ({os.strerror(-self.flags)})" if self.flags < 0 else ""
        return f"{names[self.kind]} {self.path}" + (f" to {self.other}" if self.other else "") + failed


def read_journal(file: Path, root: Path) -> list[Call]:
    """What shim.c noted, in its order."""
    above = len(str(root.resolve())) + 1
    calls, raw = [], file.read_bytes() if file.exists() else b""
    position = 0
    while position < len(raw):
        end = raw.index(b"\n", position)
        kind, *numbers = raw[position:end].decode().split()
        rank, first, second, offset, length, flags = map(int, numbers)
        parts, position = [], end + 1
        for size in (first, second, length if kind == "w" else 0):
            parts.append(raw[position : position + size])
            position += size
        path, other = (os.fsdecode(part)[above:] for part in parts[:2])
        calls.append(Call(kind, rank, path, other, offset, flags, parts[2]))
    return calls


@dataclass
class File:
    """Contents as programs see them, and as they were synced last."""

    data: bytearray = field(default_factory=bytearray)
    synced: bytes = b""
    emptied: bool = False  # since it was synced

    def surviving(self, state: str) -> bytes:
        if state == "nothing":
            return self.synced
        kept = b"" if self.emptied else self.synced
        if state != "torn":
            return kept
        common = len(kept) if self.data.startswith(kept) else 0
        return bytes(self.data[: common + (len(self.data) - common) // 2])


@dataclass
class Folder:
    """Names as programs see them and as they were synced last, and the changes since: a name, and what became of it."""

    names: dict[str, File | Folder] = field(default_factory=dict)
    synced: dict[str, File | Folder] = field(default_factory=dict)
    changed: int = -1  # the call that changed a name last, of those not synced


class Disk:
    """A folder's files, as it was before and as calls change it."""

    def __init__(self, before: Path) -> None:
        self._links: dict[int, File] = {}
        self._root = self._read(before)
        self._calls = 0

    def apply(self, call: Call) -> None:
        """Do what the call did; it may be of a file that has no name any more."""
        self._calls += 1
        if call.flags < 0 or call.path.endswith(" (deleted)"):
            return
        match call.kind:
            case "o":
                if call.flags & 1:
                    self._set(call.path, File())
                elif call.flags & 2:
                    self._file(call.path).data.clear()
                    self._file(call.path).emptied = True
            case "w":
                data = self._file(call.path).data
                data.extend(bytes(max(0, call.offset + len(call.data) - len(data))))
                data[call.offset : call.offset + len(call.data)] = call.data
            case "t":
                file = self._file(call.path)
                file.emptied |= call.offset < len(file.synced)
                del file.data[call.offset :]
                file.data.extend(bytes(call.offset - len(file.data)))
            case "s":
                found = self._find(call.path)
                if isinstance(found, Folder):
                    found.synced, found.changed = dict(found.names), -1
                else:
                    found.synced, found.emptied = bytes(found.data), False
            case "r":
                moved = self._find(call.path)
                self._set(call.path, None)
                self._set(call.other, moved)
            case "l":
                self._set(call.other, self._find(call.path))
            case "u" | "x":
                self._set(call.path, None)
            case "d":
                self._set(call.path, Folder())
            case _:
                raise NotImplementedError(str(call))

    def write(self, folder: Path, state: str) -> None:
        """Make ``folder`` as the disk is found after the power went now; ``"all"``: as programs see it."""
        last = max((found.changed for found in self._folders(self._root)), default=-1)
        written: dict[int, Path] = {}

        def put(node: File | Folder, path: Path) -> None:
            if isinstance(node, Folder):
                path.mkdir()
                every = state in ("all", "names", "torn") or (state == "last name" and node.changed == last >= 0)
                for name, inner in (node.names if every else node.synced).items():
                    put(inner, path / name)
            elif id(node) in written:
                os.link(written[id(node)], path)
            else:
                written[id(node)] = path
                path.write_bytes(node.data if state == "all" else node.surviving(state))

        put(self._root, folder)

    def _read(self, path: Path) -> Folder:
        folder = Folder()
        for inner in sorted(path.iterdir()):
            if inner.is_dir():
                node: File | Folder = self._read(inner)
            else:
                data = inner.read_bytes()
                node = self._links.setdefault(inner.stat().st_ino, File(bytearray(data), data))
            folder.names[inner.name] = folder.synced[inner.name] = node
        return folder

    def _folders(self, folder: Folder) -> Iterator[Folder]:
        yield folder
        for inner in folder.names.values():
            if isinstance(inner, Folder):
                yield from self._folders(inner)

    def _find(self, path: str) -> File | Folder:
        node: File | Folder = self._root
        for name in path.split("/") if path else []:
            assert isinstance(node, Folder)
            node = node.names[name]
        return node

    def _file(self, path: str) -> File:
        found = self._find(path)
        assert isinstance(found, File), path
        return found

    def _set(self, path: str, node: File | Folder | None) -> None:
        above, _, name = path.rpartition("/")
        folder = self._find(above)
        assert isinstance(folder, Folder)
        if node is None:
            del folder.names[name]
        else:
            folder.names[name] = node
        folder.changed = self._calls
