"""Run files: one JSON per run, written whole, claimed by one process at a time."""

from __future__ import annotations

import fcntl
import os
import platform
import socket
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch

from procon.chat import Split
from procon.errors import ProConError
from procon.files import load_json, save_json


@dataclass(frozen=True)
class Cell:
    """A run's place in the study; ``split`` says on which contrast prompts it is measured."""

    job: str
    method: str
    seed: int
    split: Split = "held_out"

    @property
    def name(self) -> str:
        """``JOB/METHOD/seed-N``."""
        return f"{self.job}/{self.method}/seed-{self.seed}"

    def path(self, runs: Path) -> Path:
        """Its file."""
        return runs / f"{self.name}.json"

    def __str__(self) -> str:
        return self.name


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Whether this process may make ``path``: nobody has made it, nor is making it.

    A claim whose process is gone, on this host, is taken over.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    claim = path.with_suffix(".claim")
    if path.is_file() or not _take(claim):
        yield False
        return
    try:
        yield not path.is_file()
    finally:
        claim.unlink(missing_ok=True)


def _take(claim: Path) -> bool:
    with _alone_in(claim.parent):  # or two processes would take over the same claim
        try:
            host, _, process = claim.read_text().partition(" ")
        except FileNotFoundError:
            pass
        else:
            if host != socket.gethostname() or not process or _is_running(int(process)):
                return False
        claim.write_text(f"{socket.gethostname()} {os.getpid()}")
        return True


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Within the context, no other process is in one for the same folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        pass
    return True


def save_run(cell: Cell, method: dict, measured: dict, runs: Path, packages: Sequence[str] = ()) -> Path:
    """Write the run file with what it was made by and on; ``packages`` are those that not every study has."""
    # In run files, which are never edited, a job is called a setting.
    return save_json(
        {"setting": cell.job, "method": method, "seed": cell.seed, "made": provenance(*packages), **measured},
        cell.path(runs),
    )


def load_run(path: Path) -> dict:
    """Read a run file.

    Raises:
        ProConError: if it is missing or damaged.
    """
    return load_json(path, lambda run: {**run, "replies": dict(run["replies"])}, "run")


def check_settings(run: dict, planned: dict, path: Path) -> dict:
    """``run``, which came from ``path``; ProConError if its method has other settings than the ``planned`` one."""
    for key, value in run["method"].items():
        if key != "label" and value != planned.get(key):
            raise ProConError(
                f"run file {str(path)!r} was made with {key} {value!r}, but the plan has {planned.get(key)!r}: "
                "delete the file and make the run again"
            )
    return run


def check_problems(run: dict, planned: Callable[[], str], path: Path) -> dict:
    """``run``, which came from ``path``; ProConError if it was measured on other task problems than the planned ones.

    Files of before the hash was written, and of other studies, have none, and are taken as they are.
    """
    if "problems" in run and run["problems"] != planned():
        raise ProConError(
            f"run file {str(path)!r} was measured on other task problems than the plan has: delete the file and make "
            "the run again"
        )
    return run


def provenance(*packages: str) -> dict:
    """Date, machine, versions and commit."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{_processor()}, {torch.get_num_threads()} of {os.cpu_count()} threads, "
        + ("GPU " + torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"),
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "transformers", "peft", *packages)},
        "commit": _commit(),
    }


@cache
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown CPU")


@cache
def _commit() -> str | None:
    found = subprocess.run(
        ["git", "rev-parse", "--short=12", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    return found.stdout.strip() or None
