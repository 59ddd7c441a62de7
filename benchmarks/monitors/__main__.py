"""``python -m benchmarks.monitors``: make the missing runs."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

from benchmarks.harness.command import run_command
from benchmarks.monitors.plan import BUDGET, Variant
from benchmarks.monitors.trial import run_trial
from benchmarks.monitors.watched import Watched
from benchmarks.study.missing import make_runs
from benchmarks.study.record import Cell, save_run
from benchmarks.study.start import demo_start

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
    return run_command("benchmarks.monitors", MonitorArguments, run_monitors, argv)


def run_monitors(arguments: MonitorArguments) -> None:
    """Make every missing run."""
    runs, work = Path(arguments.runs), Path(arguments.work)
    make_runs(
        BUDGET.cells(),
        runs,
        lambda: Watched.open(demo_start(work), work, BUDGET.size),
        partial(_make, runs=runs, work=work),
        only=arguments.only,
        threads=arguments.threads,
        listed=arguments.list,
    )


def _make(cell: Cell, watched: Watched, *, runs: Path, work: Path) -> str:
    variant = BUDGET.method(cell)
    assert isinstance(variant, Variant)
    run = run_trial(watched, variant, BUDGET.job(cell), cell.seed, cell.split, BUDGET.size, work)
    save_run(cell, asdict(variant), run, runs)
    return f"{cell}: {run['train_seconds']:.0f} s of training, rates {run['rates']}"


if __name__ == "__main__":
    sys.exit(main())
