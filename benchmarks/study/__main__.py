"""``python -m benchmarks.study``: make the missing runs of a budget, in any number of processes."""

from __future__ import annotations

import re
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import datasets
import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import HfArgumentParser

from benchmarks.study.budgets import BUDGETS
from benchmarks.study.plan import Budget
from benchmarks.study.record import Cell, claimed, load_run, save_run
from benchmarks.study.start import Start, demo_start
from benchmarks.study.trial import run_trial
from procon.demo import fetch_demo_model
from procon.errors import ProConError

HERE = Path(__file__).parent


@dataclass
class StudyArguments:
    """Fine-tune by every method, on every job, with every seed of a budget; one JSON per run."""

    budget: str = field(
        default="table", metadata={"help": "smoke (minutes), table or anchors (hours on 2 cores), or full (GPUs)."}
    )
    model: str | None = field(
        default=None,
        metadata={
            "help": "Chat model to start from: a folder or hub name; SmolLM2-135M, taught to refuse, if not given."
        },
    )
    base: str | None = field(
        default=None, metadata={"help": "The model before its safety training, which SafeLoRA needs; see the docs."}
    )
    runs: str | None = field(default=None, metadata={"help": "Folder of run files; benchmarks/study/runs/BUDGET."})
    work: str = field(default="procon-study", metadata={"help": "Folder for the start model and for checkpoints."})
    only: str = field(
        default="", metadata={"help": "Make only runs whose name this regular expression finds: ^arithmetic/procon"}
    )
    threads: int = field(default=0, metadata={"help": "CPU threads of this process; torch's choice if 0."})
    list: bool = field(default=False, metadata={"help": "Show how many runs are made and which are missing, and stop."})


def main(argv: list[str] | None = None) -> int:
    (arguments,) = HfArgumentParser(StudyArguments, prog="python -m benchmarks.study").parse_args_into_dataclasses(argv)
    try:
        run_study(arguments)
    except ProConError as error:
        print(f"study: error: {error}", file=sys.stderr)
        return 2
    return 0


def run_study(arguments: StudyArguments) -> None:
    """Make every missing run; prints one line per run and how long the rest will take."""
    budget = BUDGETS.get(arguments.budget)
    if budget is None:
        raise ProConError(f"budget is {arguments.budget!r}: choose one of {', '.join(BUDGETS)}")
    runs = Path(arguments.runs or HERE / "runs" / arguments.budget)
    cells = [cell for cell in budget.cells() if re.search(arguments.only, cell.name)]
    missing = [cell for cell in cells if not cell.path(runs).is_file()]
    console = Console()
    console.print(f"{len(cells) - len(missing)} of {len(cells)} runs are in {runs}.")
    if arguments.list or not missing:
        for cell in missing:
            console.print(f"  missing: {cell}")
        return
    _quiet(arguments.threads)
    model, base = arguments.model, arguments.base
    if model is None:
        model, base = demo_start(Path(arguments.work)), base or fetch_demo_model()
    start = Start.open(model, extraction=budget.size.extraction, pairs=budget.size.pairs, base=base)
    _run_missing(budget, missing, start, runs, console)


def _run_missing(budget: Budget, missing: list[Cell], start: Start, runs: Path, console: Console) -> None:
    """In the plan's order; what another process makes in the meantime is skipped.

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
                        path = _make(cell, budget, start, runs)
                    except Exception:
                        failed.append(cell.name)
                        console.print_exception()
                    else:
                        console.print(summary(cell, load_run(path)), soft_wrap=True)
            # From the runs that are there now, whichever process made them.
            done = sum(other.path(runs).is_file() for other in missing)
            elapsed = time.monotonic() - began
            left = (len(missing) - done) * elapsed / max(done, 1)
            progress.update(task, completed=done, left=f"about {left / 60:.0f} min left" if done else "")
    if failed:
        raise ProConError(
            f"failed, for the reasons above: {', '.join(failed)}; the other runs are there, try these again"
        )


def _make(cell: Cell, budget: Budget, start: Start, runs: Path) -> Path:
    method = budget.method(cell)
    run = run_trial(start, method, budget.job(cell), cell.seed, cell.split, budget.size)
    return save_run(cell, asdict(method), run, runs)


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
    if threads:
        torch.set_num_threads(threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()


if __name__ == "__main__":
    sys.exit(main())
