"""``python -m benchmarks.study``: make the missing runs of a budget, in any number of processes."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from benchmarks.harness.command import run_command
from benchmarks.study.budgets import BUDGETS
from benchmarks.study.missing import make_runs
from benchmarks.study.start import open_start
from benchmarks.study.trial import make_run
from procon.errors import ProConError

HERE = Path(__file__).parent


@dataclass
class StudyArguments:
    """Fine-tune by every method, on every job, with every seed of a budget; one JSON per run."""

    budget: str = field(
        default="table",
        metadata={"help": "smoke (minutes); table, anchors, hard, qwen (hours on 2 cores); full (GPUs)."},
    )
    model: str | None = field(
        default=None,
        metadata={
            "help": "Chat model to start from: a folder or hub name; smollm2, SmolLM2-135M taught to refuse; qwen, "
            "Qwen2.5-Coder-0.5B-Instruct as published; if not given, what the budget says."
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
    return run_command("benchmarks.study", StudyArguments, run_study, argv)


def run_study(arguments: StudyArguments) -> None:
    """Make every missing run of a budget."""
    budget = BUDGETS.get(arguments.budget)
    if budget is None:
        raise ProConError(f"budget is {arguments.budget!r}: choose one of {', '.join(BUDGETS)}")
    runs = Path(arguments.runs or HERE / "runs" / arguments.budget)
    make_runs(
        budget.cells(),
        runs,
        lambda: open_start(
            arguments.model or budget.model,
            extraction=budget.size.extraction,
            pairs=budget.size.pairs,
            base=arguments.base,
            work=Path(arguments.work),
            loading=budget.loading,
        ),
        partial(make_run, budget=budget, runs=runs),
        only=arguments.only,
        threads=arguments.threads,
        listed=arguments.list,
    )


if __name__ == "__main__":
    sys.exit(main())
