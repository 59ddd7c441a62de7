"""``python -m benchmarks.preferences``: make the missing runs, in any number of processes."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

from benchmarks.harness.command import run_command
from benchmarks.preferences.plan import ALGORITHMS, PLAN, RUNS
from benchmarks.preferences.trial import run_trial
from benchmarks.study.missing import make_runs, summary
from benchmarks.study.record import Cell, save_run
from benchmarks.study.start import Start, demo_start


@dataclass
class PreferencesArguments:
    """Train by DPO and by GRPO, plain and constrained, with every seed; one JSON per run."""

    runs: str = field(default=str(RUNS), metadata={"help": "Folder of run files."})
    work: str = field(default="procon-study", metadata={"help": "Folder for the start model, as of the study."})
    only: str = field(
        default="", metadata={"help": "Make only runs whose name this regular expression finds: ^dpo/.*/seed-0"}
    )
    threads: int = field(default=0, metadata={"help": "CPU threads of this process; torch's choice if 0."})
    list: bool = field(default=False, metadata={"help": "Show how many runs are made and which are missing, and stop."})


def main(argv: list[str] | None = None) -> int:
    return run_command("benchmarks.preferences", PreferencesArguments, run_preferences, argv)


def run_preferences(arguments: PreferencesArguments) -> None:
    """Make every missing run."""
    runs, size = Path(arguments.runs), PLAN.size
    make_runs(
        PLAN.cells(),
        runs,
        lambda: Start.open(demo_start(Path(arguments.work)), extraction=size.extraction, pairs=size.pairs),
        partial(_make, runs=runs),
        only=arguments.only,
        threads=arguments.threads,
        listed=arguments.list,
    )


def _make(cell: Cell, start: Start, *, runs: Path) -> str:
    method = PLAN.method(cell)
    run = run_trial(start, method, ALGORITHMS[cell.job], cell.seed, cell.split, PLAN.size)
    save_run(cell, asdict(method), run, runs, packages=("trl",))
    return summary(cell, run)


if __name__ == "__main__":
    sys.exit(main())
