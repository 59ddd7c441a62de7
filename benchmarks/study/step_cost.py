"""``python -m benchmarks.study.step_cost``: how long an optimiser step takes under each method, beside a plain one.

Real trainers on the study's model and data, in turns of two steps, as probes run in every second one. What comes ahead
of the first step and after the last, such as recording and merging, is not in it.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from tqdm.auto import tqdm

from benchmarks.harness.command import run_command
from benchmarks.harness.interleaved import Samples, interleave
from benchmarks.harness.timers import wall_time
from benchmarks.harness.turns import Turns
from benchmarks.study.jobs import JOBS
from benchmarks.study.plan import Method, Size, load_budget
from benchmarks.study.record import provenance
from benchmarks.study.start import Start, open_start
from benchmarks.study.table import Table
from benchmarks.study.trial import choose_directions, make_trainer
from procon.files import load_json, save_json

COSTS = Path(__file__).parent / "step_cost.json"

#: Of a turn.
STEPS = 2


@dataclass
class CostArguments:
    """Time the steps of the hard table's methods, and write them to a file that its page reads."""

    work: str = field(default="procon-study", metadata={"help": "Folder for the start model."})
    output: str = field(default=str(COSTS), metadata={"help": "File of the times."})
    rounds: int = field(default=15, metadata={"help": "Turns of each method."})


def main(argv: list[str] | None = None) -> int:
    return run_command("benchmarks.study.step_cost", CostArguments, _measure, argv)


def _measure(arguments: CostArguments) -> None:
    budget = load_budget("hard")
    start = open_start(
        budget.model,
        extraction=budget.size.extraction,
        pairs=budget.size.pairs,
        work=Path(arguments.work),
        loading=budget.loading,
    )
    part = next(part for part in budget.parts if part.name == "hard")
    methods = [method for method in part.methods if method.length == 1 and not method.retired]
    samples = time_steps(start, methods, budget.size, arguments.rounds)
    print(save_json({"made": provenance(), "seconds": samples.seconds}, arguments.output))


def time_steps(start: Start, methods: Sequence[Method], size: Size, rounds: int) -> Samples:
    """Seconds per turn of each method, by its name."""
    with ExitStack() as stack:
        turns = {}
        for method in tqdm(methods, desc="prepare", unit="method"):
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            trainer = make_trainer(
                start.model(),
                start.tokenizer,
                method,
                choose_directions(method, start),
                JOBS["arithmetic"],
                seed=0,
                size=size,
                folder=folder,
                max_steps=STEPS * (rounds + 10),
            )
            turns[method.name] = stack.enter_context(Turns(trainer, STEPS))
        progress = stack.enter_context(tqdm(total=len(methods) * (rounds + 2), desc="time", unit="turn"))

        def timed(turn: Callable[[], object], calls: int) -> float:
            seconds = wall_time(turn, calls)
            progress.update(calls)
            return seconds

        return interleave(turns, timed, rounds=rounds, warmup=1)


def cost_sections(methods: Sequence[Method], file: Path = COSTS) -> list[str]:
    """The section of a page on it, if the times are there."""
    if not file.is_file():
        return []
    measured = load_json(file, dict, "times of steps")
    made, labels = measured["made"], {method.name: method.label for method in methods}
    versions = ", ".join(f"{package} {made[package]}" for package in ("torch", "transformers"))
    rounds = len(measured["seconds"]["plain"])
    text = (
        f"Time of {STEPS} optimiser steps over that of {STEPS} plain ones, in turns: median of {rounds} pairs, and its "
        f"95% interval. {made['machine']}, {versions}, {made['date'][:10]}, `python -m benchmarks.study.step_cost`. "
        "Recording ahead of training and merging after it are not in it."
    )
    return ["## Cost of a step", text, cost_table(labels, measured["seconds"]).markdown()]


def cost_table(labels: Mapping[str, str], seconds: Mapping[str, list[float]]) -> Table:
    """Seconds over those of plain training; the methods that ``labels`` names, cheapest first."""
    samples = Samples({name: values for name, values in seconds.items() if name in labels})
    ratios = {name: samples.ratio(name, "plain") for name in samples.seconds if name != "plain"}
    rows = [
        [labels[name], f"{ratio.median:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"]
        for name, ratio in sorted(ratios.items(), key=lambda item: item[1].median)
    ]
    return Table(["method", "step / plain"], rows)


if __name__ == "__main__":
    sys.exit(main())
