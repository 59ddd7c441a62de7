"""``python -m benchmarks.anchor_scale simulate | costs | page | estimate``: what anchors cost at any size."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

# The installed procon comes first: in the source tree, the kernels lie beside procon and not inside it.
sys.path.append(sys.path.pop(0))

HERE = Path(__file__).parent


def simulate(options: argparse.Namespace) -> None:
    from benchmarks.anchor_scale.records import made
    from benchmarks.anchor_scale.simulation import simulate
    from benchmarks.anchor_scale.synthetic import Job
    from procon.files import save_json

    found = simulate(Job(options.folder.resolve(), options.sequences))
    print(save_json({"made": made(), **found}, options.output))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.anchor_scale", description=__doc__)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("simulate", help="fill the recorded store with synthetic projections, and measure it")
    command.add_argument("--sequences", type=int, default=10_000_000)
    command.add_argument("--folder", type=Path, required=True, help="for the store: 1 kB per sequence; not deleted")
    command.add_argument("--output", type=Path, default=HERE / "simulation.json", help="file of the figures")
    command.set_defaults(run=simulate)
    options = parser.parse_args(arguments)
    options.run(options)


if __name__ == "__main__":
    main()
