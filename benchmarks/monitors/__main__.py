"""``python -m benchmarks.monitors``: make the missing runs."""

from __future__ import annotations

import re
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import datasets
import torch
import transformers
from transformers import HfArgumentParser

from benchmarks.monitors.plan import BUDGET, Variant
from benchmarks.monitors.trial import run_trial
from benchmarks.monitors.watched import Watched
from benchmarks.study.record import claimed, save_run
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
    """Make every run that is missing; what another process makes in the meantime is skipped."""
    runs, work = Path(arguments.runs), Path(arguments.work)
    cells = [cell for cell in BUDGET.cells() if re.search(arguments.only, cell.name)]
    missing = [cell for cell in cells if not cell.path(runs).is_file()]
    print(f"{len(cells) - len(missing)} of {len(cells)} runs are in {runs}.")
    if arguments.list or not missing:
        for cell in missing:
            print(f"  missing: {cell}")
        return
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    watched = Watched.open(demo_start(work), work, BUDGET.size)
    for cell in missing:
        with claimed(cell.path(runs)) as mine:
            if mine:
                variant = BUDGET.method(cell)
                assert isinstance(variant, Variant)
                run = run_trial(watched, variant, BUDGET.job(cell), cell.seed, cell.split, BUDGET.size, work)
                save_run(cell, asdict(variant), run, runs)
                print(f"{cell}: {run['train_seconds']:.0f} s of training, rates {run['rates']}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
