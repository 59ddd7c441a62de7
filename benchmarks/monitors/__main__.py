"""``python -m benchmarks.monitors``: make the missing runs."""

from __future__ import annotations

import re
import sys
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

from rich.console import Console
from transformers import HfArgumentParser

from benchmarks.monitors.plan import BUDGET, Variant
from benchmarks.monitors.trial import run_trial
from benchmarks.monitors.watched import Watched
from benchmarks.study.missing import find_missing, make_missing, quiet
from benchmarks.study.record import Cell, save_run
from benchmarks.study.start import demo_start
from procon.errors import ProConError

RUNS = Path(__file__).parent / "runs"


@dataclass
class MonitorArguments:
    """Train monitors on SmolLM2-135M, taught to refuse; fine-tune it with and without anchors, and read them again."""

    runs: str = field(default=str(RUNS), metadata={"help": "Folder of run files."})
    work: str = field(default="procon-monitors", metadata={"help": "Folder for the start model and the monitors."})
    only: str = field(default="", metadata={"help": "Make only runs whose name this regular expression finds."})
    threads: int = field(default=0, metadata={"help": "CPU threads of this process; torch's choice if 0."})
    list: bool = field(default=False, metadata={"help": "Show how many runs are made and which are missing, and stop."})


def main(argv: list[str] | None = None) -> int:
    parser = HfArgumentParser(MonitorArguments, prog="python -m benchmarks.monitors")
    (arguments,) = parser.parse_args_into_dataclasses(argv)
    try:
        make_runs(arguments)
    except ProConError as error:
        print(f"monitors: error: {error}", file=sys.stderr)
        return 2
    return 0


def make_runs(arguments: MonitorArguments) -> None:
    """Make every run that is missing; prints one line per run and how long the rest will take."""
    runs, work = Path(arguments.runs), Path(arguments.work)
    cells = [cell for cell in BUDGET.cells() if re.search(arguments.only, cell.name)]
    console = Console()
    missing = find_missing(cells, runs, console, listed=arguments.list)
    if arguments.list or not missing:
        return
    quiet(arguments.threads)
    watched = Watched.open(demo_start(work), work, BUDGET.size)
    make_missing(missing, partial(_make, watched=watched, runs=runs, work=work), runs, console)


def _make(cell: Cell, watched: Watched, runs: Path, work: Path) -> str:
    variant = BUDGET.method(cell)
    assert isinstance(variant, Variant)
    run = run_trial(watched, variant, BUDGET.job(cell), cell.seed, cell.split, BUDGET.size, work)
    save_run(cell, asdict(variant), run, runs)
    return f"{cell}: {run['train_seconds']:.0f} s of training, rates {run['rates']}"


if __name__ == "__main__":
    sys.exit(main())
