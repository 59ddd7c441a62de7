"""One fault at a time: what is read after it, and what the next run makes of it.

Each operation runs in a forked process. What is read after a fault must be what there was before the operation, what
there should be after it, or a refusal in one line; and the next run must end as if there had been no fault.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from operations import Operation

from procon.errors import ProConError

#: Faults, and how each is said in the table.
FAULTS = {
    "kill": "killed before a call that changes files",
    "power": "the power goes there, and what was not synced is torn",
    "full": "the disk is full",
    "flip": "a bit flips in what was written",
    "cut": "what was written is cut off, or goes on",
}

#: Seconds after which a process is killed, which counts as a traceback.
PATIENCE = 60

#: What may come of a fault, and what must not.
OLD, NEW, REFUSED = "as before", "as after", "refused"
WRONG, TRACEBACK, LOST = "silently wrong", "traceback", "next run differs"
OUTCOMES = (OLD, NEW, REFUSED, WRONG, TRACEBACK, LOST)
BAD = (WRONG, TRACEBACK, LOST)

#: Calls that change files, as Python's audit hooks name them; a sync is counted too.
_CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate"}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT

Row = dict[str, str | int]


class Bench:
    """Runs one operation under faults, in ``folder``.

    Attributes:
        old: what is read before it, or the refusal; ``new``: what is read after it, both as :meth:`_child` gives them.
        calls: how many of its calls change files.
    """

    def __init__(self, operation: Operation, folder: Path) -> None:
        self.operation = operation
        self.root, self._before, self._after = folder / "root", folder / "before", folder / "after"
        self._synced = folder / "synced"
        self._before.mkdir(parents=True)
        shutil.copytree(self._before, self.root)
        self._child(operation.before)
        shutil.copytree(self.root, self._before, dirs_exist_ok=True)
        self.old = self._child(operation.read)
        code, said = self._child(operation.run, counts=True)
        if code:
            raise SystemExit(f"{operation.name} fails without a fault: {said}")
        self.calls = int(said)
        shutil.copytree(self.root, self._after)
        self.new = self._child(operation.read)
        self._reset(self._after)
        self._child(operation.run)
        if self.new[0] or self._child(operation.read) != self.new:
            raise SystemExit(f"{operation.name} differs by itself: {self.new}")

    def row(self, fault: str, limit: int, show: Callable[[str], None] = print) -> Row:
        """What came of ``limit`` faults of a kind, drawn at random, or of all if there are fewer."""
        draw = random.Random(f"{self.operation.name} {fault}")
        if fault in ("flip", "cut"):
            counts = Counter(self._damage(*damage) for damage in self._damages(draw, fault, limit))
        else:
            counts = Counter(self._fault(fault, number) for number in self._calls(draw, fault, limit))
        for outcome in BAD:
            if counts[outcome]:
                show(f"{self.operation.name}, {FAULTS[fault]}: {counts[outcome]} {outcome}")
        tried = {"points": counts.total(), **{outcome: counts[outcome] for outcome in OUTCOMES}}
        return {"operation": self.operation.name, "fault": FAULTS[fault], **tried}

    def _calls(self, draw: random.Random, fault: str, limit: int) -> list[int]:
        """Numbers of calls; of a full disk, the bytes that a file may have."""
        sizes = [path.stat().st_size for path in self._after.rglob("*") if path.is_file()]
        every = range(max(sizes)) if fault == "full" else range(1, self.calls + 2)  # also after the last one
        return sorted(draw.sample(every, min(limit, len(every))))

    def _damages(self, draw: random.Random, fault: str, limit: int) -> Iterator[tuple[Path, bytes]]:
        """Files and what is in them instead."""
        files = sorted(self._after.glob(self.operation.damaged)) if self.operation.damaged else []
        for number in range(limit if files else 0):
            file = files[number % len(files)]
            data = bytearray(file.read_bytes())
            if fault == "flip":
                place = draw.randrange(8 * len(data))
                data[place // 8] ^= 1 << place % 8
                content = bytes(data)
            else:
                content = bytes(data[: draw.randrange(len(data))]) if number % 3 else bytes(data) + b"\0"
            yield file.relative_to(self._after), content

    def _damage(self, file: Path, content: bytes) -> str:
        self._reset(self._after)
        (self.root / file).write_bytes(content)
        return self._outcome(self._child(self.operation.read))

    def _fault(self, fault: str, number: int) -> str:
        self._reset(self._before)
        self._synced.unlink(missing_ok=True)
        code, said = self._child(self.operation.run, **{"bytes_" if fault == "full" else "kill": number})
        if fault == "full" and code not in (0, 2):
            print(said, file=sys.stderr)
            return TRACEBACK
        if fault == "power":
            self._tear()
        found = self._outcome(self._child(self.operation.read))
        if found in BAD:
            return found
        code, said = self._child(self.operation.run)
        if code or self._child(self.operation.read) != self.new:
            print(said, file=sys.stderr)
            return LOST
        return found

    def _outcome(self, found: tuple[int, str]) -> str:
        code, said = found
        if found == self.new:
            return NEW
        if code == 2:
            return REFUSED if said and "\n" not in said else TRACEBACK
        if code:
            print(said, file=sys.stderr)
            return TRACEBACK
        return OLD if found == self.old else WRONG

    def _tear(self) -> None:
        """Cut in half each file that was not there before, and was written to after its last sync, if it had one."""
        synced = set(self._synced.read_text().splitlines()) if self._synced.exists() else set()
        for path in self.root.rglob("*"):
            old = self._before / path.relative_to(self.root)
            if path.is_file() and _state(path.stat()) not in synced:
                data = path.read_bytes()
                if not (old.is_file() and old.read_bytes() == data):
                    path.write_bytes(data[: len(data) // 2])

    def _reset(self, state: Path) -> None:
        shutil.rmtree(self.root, ignore_errors=True)
        shutil.copytree(state, self.root)

    def _child(
        self, call: Callable[[], object], *, kill: int = 0, bytes_: int | None = None, counts: bool = False
    ) -> tuple[int, str]:
        """Exit code of ``call`` in a process of its own, as the command line has it, and its result or error.

        Args:
            kill: the number of the call that changes files before which it is killed.
            bytes_: that a file may have.
            counts: gives the number of calls in place of the result.
        """
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            code, said = 1, ""
            signal.alarm(PATIENCE)
            try:
                os.close(reader)
                os.chdir(self.root)
                for number in (1, 2):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), number)
                counted = _Calls(kill, os.open(self._synced, os.O_WRONLY | os.O_CREAT | os.O_APPEND) if kill else -1)
                if bytes_ is not None:
                    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_, resource.RLIM_INFINITY))
                value = call()
                code, said = 0, str(counted.number if counts else value)
            except ProConError as error:
                code, said = 2, str(error)
            except BaseException:
                said = traceback.format_exc()
            finally:
                os.write(writer, json.dumps(said[-60_000:]).encode())
                os._exit(code)
        os.close(writer)
        with os.fdopen(reader) as pipe:
            said = pipe.read()
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return code, json.loads(said) if said else ""


class _Calls:
    """Counts the calls of this process that change files, notes what is synced, and kills it before call ``kill``."""

    def __init__(self, kill: int, synced: int) -> None:
        self.number = 0
        self._kill = kill
        sync = os.fsync

        def noted(descriptor: int) -> None:
            self._count()
            sync(descriptor)
            if synced >= 0:
                os.write(synced, f"{_state(os.fstat(descriptor))}\n".encode())

        os.fsync = noted
        sys.addaudithook(self._audit)

    def _audit(self, event: str, arguments: tuple) -> None:
        if event in _CHANGES or (event == "open" and (arguments[2] or 0) & _WRITES):
            self._count()

    def _count(self) -> None:
        self.number += 1
        if self.number == self._kill:
            os.kill(os.getpid(), signal.SIGKILL)


def _state(found: os.stat_result) -> str:
    return f"{found.st_ino} {found.st_size} {found.st_mtime_ns}"
