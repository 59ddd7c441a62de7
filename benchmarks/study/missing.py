"""Make the missing runs of a plan, in any number of processes."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import datasets
import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.study.record import Cell, claimed
from procon.errors import ProConError

_Start = TypeVar("_Start")


def make_runs(
    cells: Sequence[Cell],
    runs: Path,
    start: Callable[[], _Start],
    make: Callable[[Cell, _Start], str],
    *,
    only: str,
    threads: int,
    listed: bool,
) -> None:
    """Make every run that is missing; prints one line per run and how long the rest will take.

    Args:
        start: what all runs begin with; called once, if there is a run to make.
        make: makes the run of a cell from it, writes its file, and returns a line on it.
        only: makes runs whose name this regular expression finds.
        threads: of torch; its own choice if 0.
        listed: show how many runs are made and which are missing, and make none.

    Raises:
        ProConError: at the end, if some failed.
    """
    console = Console()
    missing = _find_missing([cell for cell in cells if re.search(only, cell.name)], runs, console, listed=listed)
    if listed or not missing:
        return
    _quiet(threads)
    begun = start()
    _make_missing(missing, lambda cell: make(cell, begun), runs, console)


def _find_missing(cells: Sequence[Cell], runs: Path, console: Console, *, listed: bool) -> list[Cell]:
    """The cells that have no run yet; prints how many have, and if ``listed`` which have not."""
    missing = [cell for cell in cells if not cell.path(runs).is_file()]
    console.print(f"{len(cells) - len(missing)} of {len(cells)} runs are in {runs}.")
    if listed:
        for cell in missing:
            console.print(f"  missing: {cell}")
    return missing


def _make_missing(missing: Sequence[Cell], make: Callable[[Cell], str], runs: Path, console: Console) -> None:
    """In the order given; what another process makes in the meantime is skipped.

    Args:
        make: makes the run of a cell, writes its file, and returns a line on it.

    Raises:
        ProConError: at the end, if some failed: hours of others do not wait for one that diverges.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
    )
    began, failed = time.monotonic(), []
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("runs", total=len(missing), left="")
        for cell in missing:
            with claimed(cell.path(runs)) as mine:
                if mine:
                    progress.update(task, description=str(cell))
                    try:
                        line = make(cell)
                    except Exception:
                        failed.append(cell.name)
                        console.print_exception()
                    else:
                        console.print(line, soft_wrap=True)
            # From the runs that are there now, whichever process made them.
            done = sum(other.path(runs).is_file() for other in missing)
            elapsed = time.monotonic() - began
            left = (len(missing) - done) * elapsed / max(done, 1)
            progress.update(task, completed=done, left=f"about {left / 60:.0f} min left" if done else "")
    if failed:
        raise ProConError(
            f"failed, for the reasons above: {', '.join(failed)}; the other runs are there, try these again"
        )


def summary(cell: Cell, run: dict) -> str:
    """One line on a run."""
    replies = run["replies"]

    def share(kind: str, key: str) -> str:
        return f"{sum(reply[key] for reply in replies[kind]) / len(replies[kind]):.0%}"

    return (
        f"{cell}: refuses {share('malicious', 'refused')} of malicious and {share('benign', 'refused')} of benign "
        f"prompts, task {share('task', 'correct')}, {run['train_seconds']:.0f} s of training"
    )


def _quiet(threads: int) -> None:
    """No logs or bars of other packages; ``threads`` of torch if above 0."""
    if threads:
        torch.set_num_threads(threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
