"""``python -m benchmarks.anchor_scale simulate | costs | page | estimate``: what anchors cost at any size."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

# The installed procon comes first: in the source tree, the kernels lie beside procon and not inside it.
sys.path.append(sys.path.pop(0))

from benchmarks.anchor_scale import records
from procon.files import save_json


def simulate(options: argparse.Namespace) -> None:
    from benchmarks.anchor_scale.simulation import simulate
    from benchmarks.anchor_scale.synthetic import Job

    made = records.made()
    found = simulate(Job(options.folder.resolve(), options.sequences))
    print(save_json({"made": made, **found}, options.output))


def costs(options: argparse.Namespace) -> None:
    found = records.load_ratios() if records.COSTS.is_file() else {}
    found |= records.read_ratios(json.loads(file.read_text(encoding="utf-8")) for file in options.results)
    print(save_json({name: ratio._asdict() for name, ratio in found.items()}, records.COSTS))


def page(options: argparse.Namespace) -> None:
    from benchmarks.anchor_scale.page import write_page

    for file in write_page(options.output):
        print(file)


def estimate(options: argparse.Namespace) -> None:
    from benchmarks.anchor_scale.advice import Plan, advise, cost_table
    from benchmarks.anchor_scale.arithmetic import MODELS, Ranks

    plan = Plan(
        model={model.name: model for model in MODELS}[options.model],
        tokens=int(options.tokens),
        ranks=Ranks(options.ranks, options.ranks_per_host, shared=not options.disks_apart),
        training="full" if options.full else "lora",
        passes=options.passes,
        known=not options.stream,
        sharded=options.sharded,
        free_bytes=options.free_bytes,
        per_sequence=options.tokens_per_sequence,
        per_step=options.tokens_per_step,
    )
    simulation = json.loads(records.SIMULATION.read_text(encoding="utf-8"))
    print(cost_table(plan, records.Measured.of(simulation)).markdown())
    source, reason = advise(plan)
    print(f"\nby cost alone: {source}, as {reason}")


def main(arguments: Sequence[str] | None = None) -> None:
    form = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m benchmarks.anchor_scale", description=__doc__)
    commands = parser.add_subparsers(required=True)

    command = commands.add_parser(
        "simulate", formatter_class=form, help="measure the recorded store, filled with made-up numbers"
    )
    command.add_argument(
        "--folder", type=Path, required=True, help="for the store, 1.1 kB per sequence; it is not deleted"
    )
    command.add_argument("--sequences", type=int, default=10_000_000, help="how many")
    command.add_argument("--output", type=Path, default=records.SIMULATION, help="file of the figures")
    command.set_defaults(run=simulate)

    command = commands.add_parser("costs", help="keep the ratios of result files for the page")
    command.add_argument("results", nargs="+", type=Path, help="files that --benchmark-json wrote")
    command.set_defaults(run=costs)

    command = commands.add_parser("page", formatter_class=form, help="write scale.md and its plot")
    command.add_argument("--output", type=Path, default=Path("docs"), help="folder of pages; cost.md in it is read")
    command.set_defaults(run=page)

    command = commands.add_parser("estimate", formatter_class=form, help="what each source costs a job of yours")
    command.add_argument("--tokens", type=float, required=True, help="constrained tokens of the data set")
    command.add_argument("--ranks", type=int, default=1, help="processes, one per GPU")
    command.add_argument("--ranks_per_host", type=int, default=8, help="of them on one host")
    command.add_argument("--disks_apart", action="store_true", help="hosts share no file system")
    command.add_argument(
        "--model", default="Llama-3-8B", help="SmolLM2-135M, Llama-3-8B or Llama-3-70B: that nearest to yours"
    )
    command.add_argument("--full", action="store_true", help="all weights train; a fresh LoRA adapter if not given")
    command.add_argument("--sharded", action="store_true", help="FSDP2 or ZeRO-3")
    command.add_argument("--passes", type=int, default=1, help="over the data: epochs, of all runs from the same start")
    command.add_argument("--stream", action="store_true", help="tokens do not exist before training")
    command.add_argument("--free_bytes", type=float, default=1e12, help="disk for anchors on each file system")
    command.add_argument("--tokens_per_sequence", type=int, default=200, help="on average")
    command.add_argument("--tokens_per_step", type=int, default=4096, help="of one rank in an optimiser step")
    command.set_defaults(run=estimate)

    options = parser.parse_args(arguments)
    options.run(options)


if __name__ == "__main__":
    main()
