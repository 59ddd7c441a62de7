"""One fault at one call of one operation: what is found after it, and what the next run makes of it."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import disk
import shim
import torch.distributed as dist
from operations import Operation, contents

#: Seconds after which an operation counts as hanging.
PATIENCE = 240

#: What is done at a call, beside the states that a cut of the power leaves.
FAULTS = {
    "kill": "killed before the call",
    "half": "killed after half of a write",
    "ENOSPC": "the call fails: no space left",
    "EIO": "the call fails: input or output error",
    "full": "the call and all later ones that need space fail: no space left",
    "power": "the power goes before the call, and what was not synced is lost",
}


@dataclass
class Point:
    """A fault, and what came of it; the last five are texts, empty if there is nothing to say."""

    operation: str
    kind: str
    rank: int
    n: int
    state: str = ""
    call: str = ""
    mixture: str = ""
    loss: str = ""
    differs: str = ""
    leftover: str = ""
    traceback: str = ""
    seconds: float = 0.0
    reached: bool = True  # what a rank does first may leave another with fewer calls than in the run without a fault

    @property
    def key(self) -> tuple[str, str, int, int, str]:
        return self.operation, self.kind, self.rank, self.n, self.state

    @property
    def bad(self) -> str:
        names = ("mixture", "loss", "differs", "leftover", "traceback")
        return "; ".join(f"{name}: {getattr(self, name)}" for name in names if getattr(self, name))


@dataclass
class Ended:
    """How forked processes ended: exit codes, below 0 for signals, and what they printed and returned, by rank."""

    codes: list[int]
    texts: list[str]
    value: object = None

    @property
    def hangs(self) -> bool:
        return -signal.SIGALRM in self.codes


@dataclass
class Bench:
    """Runs one operation's points in ``folder``.

    Attributes:
        calls: of the run without a fault, in its order.
        expected: what its result is.
    """

    operation: Operation
    folder: Path
    calls: list[disk.Call] = field(default_factory=list)
    expected: dict[str, str] = field(default_factory=dict)
    _known: dict[str, tuple[str, str, str, str, str]] = field(default_factory=dict)

    @property
    def root(self) -> Path:
        return self.folder / "root"

    def prepare(self) -> None:
        """Run it without a fault, twice: what is compared must not differ by itself."""
        shutil.rmtree(self.folder, ignore_errors=True)
        (self.folder / "before").mkdir(parents=True)
        self._fork(self.operation.before, at=self.folder / "before")
        results = []
        for journal in (self.folder / "journal", None):
            self._reset()
            ended = self._run(journal=journal)
            if any(ended.codes):
                raise SystemExit(f"{self.operation.name} fails without a fault:\n" + "\n".join(ended.texts)[-3000:])
            results.append(self._result())
        self.expected = results[0]
        if differing := _difference(*results):
            raise SystemExit(f"{self.operation.name} gives two results without a fault: {differing}")
        self.calls = disk.read_journal(self.folder / "journal", self.root)
        again = self.folder / "again"
        replayed = disk.Disk(self.folder / "before")
        for call in self.calls:
            replayed.apply(call)
        replayed.write(again, "all")
        self._reset()
        self._run(journal=self.folder / "unused")
        if set(contents(again)) != set(contents(self.root)) and self.operation.ranks == 1:
            raise SystemExit(f"{self.operation.name}: its journal does not tell what it wrote")
        shutil.rmtree(again)

    def points(self, kind: str, limit: int) -> list[Point]:
        """Every one of a kind, or ``limit`` of them drawn at random."""
        found = list(self._all(kind))
        if len(found) <= limit:
            return found
        return [found[number] for number in sorted(random.Random(0).sample(range(len(found)), limit))]

    def count(self, kind: str) -> int:
        return sum(1 for _ in self._all(kind))

    def _all(self, kind: str) -> Iterator[Point]:
        name = self.operation.name
        if kind == "power":
            for n in range(1, len(self.calls) + 2):
                call = str(self.calls[n - 1]) if n <= len(self.calls) else "the end"
                for state in disk.STATES:
                    yield Point(name, kind, 0, n, state, call)
            return
        for rank in range(self.operation.ranks):
            own = [call for call in self.calls if call.rank == rank]
            for n, call in enumerate(own, 1):
                if kind != "half" or call.kind == "w":
                    yield Point(name, kind, rank, n, call=str(call))

    def run(self, point: Point) -> Point:
        """The point, with what came of it."""
        began = time.monotonic()
        if point.kind == "power":
            self._cut(point)
        else:
            self._reset()
            ended = self._run(rank=point.rank, n=point.n, action=point.kind)
            point.reached = self.operation.ranks == 1 or any(ended.codes) or point.kind not in ("kill", "half")
            if not point.reached:
                return point
            point.traceback = self._said_badly(point, ended)
            point.loss = "hangs" if ended.hangs else ""
            done = not any(ended.codes)
            self._judge(point, done)
        point.seconds = round(time.monotonic() - began, 2)
        return point

    def _cut(self, point: Point) -> None:
        replayed = disk.Disk(self.folder / "before")
        for call in self.calls[: point.n - 1]:
            replayed.apply(call)
        shutil.rmtree(self.root, ignore_errors=True)
        replayed.write(self.root, point.state)
        done = point.n > len(self.calls)
        # The next run sees the disk alone: of equal ones, one will do.
        key = f"{done} {contents(self.root)}"
        if key not in self._known:
            self._judge(point, done)
            self._known[key] = (point.mixture, point.loss, point.differs, point.leftover, point.traceback)
        point.mixture, point.loss, point.differs, point.leftover, point.traceback = self._known[key]

    def _judge(self, point: Point, done: bool) -> None:
        """What is there now, and after the next run; ``done``: the operation said that it succeeded."""
        single = self.operation.single
        if single:
            before, now = self.folder / "before" / single, self.root / single
            found = contents(self.root).get(single, "none")
            old, new = contents(before.parent).get(single, "none"), self.expected[single]
            if found not in (old, new):
                gone = not now.exists() or not now.stat().st_size
                setattr(
                    point, "loss" if gone else "mixture", f"{single} is {'gone' if gone else 'neither old nor new'}"
                )
            elif done and found != new:
                point.loss = f"{single} is not the new one, though the command succeeded"
        ended = self._run(self._next_run)
        checked, after = ended.value or ("the check ends early", None)
        point.mixture = point.mixture or checked
        if any(ended.codes):
            point.loss = point.loss or f"the next run ends with {ended.codes}: {_last_line(''.join(ended.texts))}"
            return
        extra = sorted(set(after) - set(self.expected))
        point.leftover = ", ".join(extra[:3])
        point.differs = _difference(self.expected, {name: value for name, value in after.items() if name not in extra})

    def _next_run(self) -> int:
        """Check what is there, run again, and report the result; in the processes of the ranks."""
        main = os.environ.get("RANK", "0") == "0"
        checked = ""
        try:
            if main:
                self.operation.check()
        except Exception as error:
            checked = f"{type(error).__name__}: {error}"[:300]
        self._report((checked, None), main)
        code = self.operation.again()
        if dist.is_initialized():
            dist.barrier()
        if code == 0 and main:
            self._report((checked, self.operation.result()), main)
        return code

    def _report(self, value: object, main: bool = True) -> None:
        if main:
            (self.folder / "meeting" / "value.json").write_text(json.dumps(value))

    def _said_badly(self, point: Point, ended: Ended) -> str:
        code, text = ended.codes[point.rank], ended.texts[point.rank]
        if point.kind in ("kill", "half"):
            return "" if code == -signal.SIGKILL else f"the fault did not come: exit code {code}: {_last_line(text)}"
        lines = [line for line in text.splitlines() if line.startswith("procon: error: ")]
        if code == 0 or (code == 2 and len(lines) == 1 and "Traceback" not in text):
            return ""
        return f"exit code {code}: {_last_line(text)}"

    def _reset(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)
        shutil.copytree(self.folder / "before", self.root)

    def _result(self) -> dict[str, str]:
        ended = self._fork(lambda: self._report(self.operation.result()))
        if ended.value is None:
            raise SystemExit(f"{self.operation.name} has no result without a fault:\n{ended.texts[0][-3000:]}")
        return ended.value

    def _run(self, call: Callable[[], int] | None = None, rank: int = 0, **fault) -> Ended:
        """On all ranks; the fault, if there is one, on one of them."""
        if "journal" in fault:
            faults = [{**fault, "rank": each} for each in range(self.operation.ranks)]
            if fault["journal"]:
                fault["journal"].unlink(missing_ok=True)
        else:
            faults = [fault if fault and each == rank else None for each in range(self.operation.ranks)]
        return self._fork(call or self.operation.run, faults=faults)

    def _fork(self, call: Callable[[], object], *, at: Path | None = None, faults: list | None = None) -> Ended:
        faults = faults or [None]
        shutil.rmtree(self.folder / "meeting", ignore_errors=True)
        (self.folder / "meeting").mkdir()
        children = [self._start(call, at or self.root, rank, faults) for rank in range(len(faults))]
        codes = []
        for child in children:
            _, status = os.waitpid(child, 0)
            codes.append(os.waitstatus_to_exitcode(status))
        texts = [(self.folder / "meeting" / f"said-{rank}").read_text(errors="replace") for rank in range(len(faults))]
        value = self.folder / "meeting" / "value.json"
        return Ended(codes, texts, json.loads(value.read_text()) if value.exists() else None)

    def _start(self, call: Callable[[], object], at: Path, rank: int, faults: list) -> int:
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if child:
            return child
        code = 1
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(PATIENCE)
            meeting = self.folder / "meeting"
            said = os.open(meeting / f"said-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(said, 1)
            os.dup2(said, 2)
            sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
            os.chdir(at)
            if len(faults) > 1:
                ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": len(faults), "LOCAL_WORLD_SIZE": len(faults)}
                os.environ |= {name: str(value) for name, value in ranks.items()}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "GLOO_SOCKET_IFNAME": "lo"}
                store = dist.FileStore(str(meeting / "store"), len(faults))
                dist.init_process_group("gloo", store=store, rank=rank, world_size=len(faults))
            if faults[rank] is not None:
                shim.arm(at, **{"rank": rank, **faults[rank]})
            value = call()
            if faults[rank] is not None:
                shim.disarm()
            code = value if isinstance(value, int) else 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)


def to_line(point: Point) -> str:
    return json.dumps(asdict(point)) + "\n"


def _difference(expected: dict[str, str], found: dict[str, str]) -> str:
    names = [name for name in sorted(expected.keys() | found.keys()) if expected.get(name) != found.get(name)]
    return ", ".join(names[:4])


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["nothing said"])[-1][:300]
