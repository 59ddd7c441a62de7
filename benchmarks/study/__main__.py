"""``python -m benchmarks.study``: make the missing runs of a budget, in any number of processes."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.harness.command import run_command
from benchmarks.study.jobs import find_job
from benchmarks.study.plan import RUNS, Budget, Cell, load_budget
from benchmarks.study.record import claimed, load_runs, provenance, save_run
from benchmarks.study.start import Start, open_start
from benchmarks.study.trial import run_trial
from procon.errors import ProConError


@dataclass
class StudyArguments:
    """Fine-tune by every method, on every job, with every seed of a budget; a line of its file per run."""

    budget: str = field(
        default="table",
        metadata={"help": "smoke (minutes); table, anchors, hard, qwen, preferences (hours on 2 cores)."},
    )
    model: str | None = field(
        default=None,
        metadata={
            "help": "Chat model to start from: a folder or hub name; smollm2, SmolLM2-135M taught to refuse; qwen, "
            "Qwen2.5-Coder-0.5B-Instruct as published; if not given, what the budget says."
        },
    )
    runs: str | None = field(
        default=None, metadata={"help": "File of the runs; benchmarks/study/runs/BUDGET.jsonl.xz."}
    )
    work: str = field(default="procon-study", metadata={"help": "Folder for the start model and for trained adapters."})
    only: str = field(
        default="", metadata={"help": "Make only runs whose name this regular expression finds: ^arithmetic/procon"}
    )
    threads: int = field(default=0, metadata={"help": "CPU threads of this process; torch's choice if 0."})
    list: bool = field(default=False, metadata={"help": "Show how many runs are made and which are missing, and stop."})


def main(argv: list[str] | None = None) -> int:
    return run_command("benchmarks.study", StudyArguments, run_study, argv)


def run_study(arguments: StudyArguments) -> None:
    """Make every missing run of a budget whose method can still be run.

    Raises:
        ProConError: at the end, if some failed: hours of others do not wait for one that diverges.
    """
    console = Console()
    budget = load_budget(arguments.budget)
    path = Path(arguments.runs or RUNS / f"{arguments.budget}.jsonl.xz")
    cells, made = [cell for cell in budget.cells() if re.search(arguments.only, str(cell))], load_runs(path)
    missing = [cell for cell in cells if cell not in made and not budget.method(cell.method).retired]
    console.print(f"{sum(cell in made for cell in cells)} of {len(cells)} runs are in {path}.")
    if arguments.list:
        for cell in missing:
            console.print(f"  missing: {cell}")
    if arguments.list or not missing:
        return
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    start = open_start(
        arguments.model or budget.model,
        extraction=budget.size.extraction,
        pairs=budget.size.pairs,
        work=Path(arguments.work),
        loading=budget.loading,
    )
    trial = _trial(arguments.budget, Path(arguments.work))
    failed = _make(missing, lambda cell: trial(start, budget, cell), path, console)
    if failed:
        raise ProConError(
            f"failed, for the reasons above: {', '.join(failed)}; the other runs are there, try these again"
        )


def _trial(budget: str, work: Path) -> Callable[[Start, Budget, Cell], dict[str, Any]]:
    if budget == "preferences":
        from benchmarks.preferences.trial import run_trial as run_preferences

        return run_preferences
    return partial(make_run, adapters=work / "adapters" / budget)


def make_run(start: Start, budget: Budget, cell: Cell, adapters: Path | None = None) -> dict[str, Any]:
    """The run of a cell, with what it was made by and on; what was trained is kept in a folder of ``adapters``."""
    method = budget.method(cell.method)
    kept = adapters and adapters / str(cell)
    measured = run_trial(start, method, find_job(cell.job), cell.seed, cell.split, budget.size, kept)
    return {"job": cell.job, "method": asdict(method), "seed": cell.seed, "made": provenance(), **measured}


def _make(cells: Sequence[Cell], run: Callable[[Cell], dict], path: Path, console: Console) -> list[str]:
    """In the order given; what another process makes in the meantime is skipped. Returns the names that failed."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    failed, began = [], time.monotonic()
    with Progress(*columns, TextColumn("{task.fields[left]}"), console=console) as progress:
        task = progress.add_task("runs", total=len(cells), left="")
        for cell in cells:
            with claimed(cell, path) as mine:
                if mine:
                    progress.update(task, description=str(cell))
                    try:
                        found = run(cell)
                    except Exception:
                        failed.append(str(cell))
                        console.print_exception()
                    else:
                        save_run(found, path)
                        console.print(summary(cell, found), soft_wrap=True)
            # From the runs that are there now, whichever process made them.
            done = len(load_runs(path).keys() & set(cells))
            left = (len(cells) - done) * (time.monotonic() - began) / max(done, 1)
            progress.update(task, completed=done, left=f"about {left / 60:.0f} min left" if done else "")
    return failed


def summary(cell: Cell, run: dict) -> str:
    """One line on a run."""
    replies = run["replies"]

    def share(kind: str, key: str) -> str:
        return f"{sum(reply[key] for reply in replies[kind]) / len(replies[kind]):.0%}"

    return (
        f"{cell}: refuses {share('malicious', 'refused')} of malicious and {share('benign', 'refused')} of benign "
        f"prompts, task {share('task', 'correct')}, {run['train_seconds']:.0f} s of training"
    )


if __name__ == "__main__":
    sys.exit(main())
