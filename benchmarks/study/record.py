"""Runs: a line of JSON each, all those of a budget in one compressed file, claimed by one process at a time."""

from __future__ import annotations

import fcntl
import json
import lzma
import os
import platform
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch

from benchmarks.study.plan import Cell
from procon.errors import ProConError
from procon.files import write_bytes


def load_runs(path: Path) -> dict[Cell, dict]:
    """The runs of a file, ``.jsonl.xz``; none if it is not there.

    Raises:
        ProConError: if it is damaged.
    """
    if not path.is_file():
        return {}
    try:
        runs = [json.loads(line) for line in lzma.decompress(path.read_bytes()).splitlines()]
        return {Cell(run["job"], run["method"]["name"], run["seed"], run["split"]): run for run in runs}
    except (lzma.LZMAError, ValueError, TypeError, KeyError) as error:
        raise ProConError(f"file of runs {str(path)!r} is damaged: get it again") from error


def save_run(run: dict, path: Path) -> None:
    """Add a run to a file of them, which is written whole."""
    with _locked(path.with_suffix(".lock"), wait=True):
        runs = load_runs(path)
        runs[Cell(run["job"], run["method"]["name"], run["seed"], run["split"])] = run
        lines = (json.dumps(run, ensure_ascii=False) + "\n" for _, run in sorted(runs.items()))
        write_bytes(lzma.compress("".join(lines).encode()), path)


@contextmanager
def claimed(cell: Cell, path: Path) -> Iterator[bool]:
    """Whether this process may make the run of ``cell``: it is not in the file ``path``, and no other makes it.

    The system gives a claim back when its process ends, however it ends.
    """
    name = f"{path.name.partition('.')[0]}-{str(cell).replace('/', '-')}.lock"
    with _locked(path.with_name(name), wait=False) as mine:
        yield mine and cell not in load_runs(path)


@contextmanager
def _locked(path: Path, *, wait: bool) -> Iterator[bool]:
    """Whether no other process is in this context for the same ``path``; ``wait`` until none is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


def provenance(packages: Sequence[str] = ()) -> dict:
    """Date, machine, versions and commit; ``packages`` are those that not every study has."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{_processor()}, {torch.get_num_threads()} of {os.cpu_count()} threads, "
        + ("GPU " + torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"),
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "transformers", "peft", *packages)},
        "commit": _commit(),
    }


def check_problems(run: dict, planned: Callable[[], str], cell: Cell) -> None:
    """ProConError if a run was measured on other task problems than the planned ones.

    Runs of before their hash was written have none, and are taken as they are.
    """
    if "problems" in run and run["problems"] != planned():
        raise ProConError(f"run {cell} was measured on other task problems than the plan has: make it again")


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
