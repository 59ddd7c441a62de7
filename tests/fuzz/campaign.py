"""Inputs in processes of their own: what ends one, or goes on for ever, is counted and not the end of the campaign."""

from __future__ import annotations

import os
import select
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

from procon.errors import ProConError

#: Seconds for one input; the slowest that is in order needs a tenth of it on a busy machine.
LONGEST = 60.0

#: Inputs that one process takes.
CHUNK = 500

OUTCOMES = ("accepted", "refused", "traceback", "crash", "hang")


@dataclass(frozen=True)
class Kind:
    """One way in.

    Attributes:
        make: an input from a source of chance.
        take: gives it to the library; what it raises but ProConError is a traceback.
        count: inputs of the whole campaign.
    """

    make: Callable[[Random], Any]
    take: Callable[[Any], None]
    count: int


@dataclass
class Found:
    """Outcomes of one kind; ``failures`` has the numbers and reasons of the bad ones; memory is in bytes."""

    outcomes: Counter[str] = field(default_factory=Counter)
    failures: list[tuple[int, str, str]] = field(default_factory=list)
    memory: int = 0
    seconds: float = 0.0


def outcome(kind: Kind, name: str, number: int) -> tuple[str, str]:
    """What becomes of input ``number``, and why."""
    try:
        kind.take(kind.make(Random(f"{name} {number}")))
    except ProConError as error:
        line = str(error)
        if not line.isprintable() or not 0 < len(line) <= 20_000:
            return "traceback", f"the error is no printable line: {line!r:.300}"
        return "refused", ""
    except BaseException:  # SystemExit would end the process
        return "traceback", traceback.format_exc(limit=-4)
    return "accepted", ""


def run(kind: Kind, name: str, first: int, count: int, show: Callable[[int], None]) -> Found:
    """Inputs ``first`` to ``first + count - 1``."""
    found, began, number = Found(), time.monotonic(), first
    while number < first + count:
        number = _in_a_process(kind, name, number, min(first + count, number + CHUNK), found)
        show(number - first)
    found.seconds = time.monotonic() - began
    return found


def _in_a_process(kind: Kind, name: str, first: int, end: int, found: Found) -> int:
    """Counts what becomes of inputs ``first`` to ``end - 1``, up to one that ends the process; returns the next one."""
    receiving, sending = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process == 0:
        os.close(receiving)
        _work(kind, name, range(first, end), sending)
    os.close(sending)
    number, hung = first, False
    with os.fdopen(receiving, "rb", buffering=0) as pipe:
        waiting = b""
        while number < end:
            if not select.select([pipe], [], [], LONGEST)[0]:
                hung = True
                os.kill(process, signal.SIGKILL)
                break
            part = pipe.read(1 << 16)
            if not part:
                break
            *lines, waiting = (waiting + part).split(b"\0")
            for line in lines:
                result, _, reason = line.decode(errors="replace").partition(" ")
                found.outcomes[result] += 1
                if result == "traceback":
                    found.failures.append((number, result, reason))
                number += 1
    _, status, usage = os.wait4(process, 0)
    found.memory = max(found.memory, usage.ru_maxrss * 1024)
    if number < end:
        result = "hang" if hung else "crash"
        found.outcomes[result] += 1
        found.failures.append((number, result, f"status {status}"))
        number += 1
    return number


def _work(kind: Kind, name: str, numbers: range, sending: int) -> None:
    """The other process: never returns."""
    code = 1
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
        sys.stdout = sys.stderr = open(os.devnull, "w", errors="backslashreplace")  # noqa: SIM115  # to the end
        for number in numbers:
            result, reason = outcome(kind, name, number)
            os.write(sending, f"{result} {reason[-1500:]}".encode(errors="replace").replace(b"\0", b"0") + b"\0")
        code = 0
    finally:
        os._exit(code)
