"""``python -m benchmarks.audit contest``: count, show, record, and make the page."""

import argparse
import json
from pathlib import Path

from benchmarks.audit.contest import SIZES, TARGETS, WHO, run, show


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.audit contest",
        description="Our kernels and those of others, compiled for the same GPUs and counted. No GPU is needed.",
    )
    parser.add_argument("--who", nargs="+", choices=tuple(WHO), default=tuple(WHO))
    parser.add_argument("--call", default="", help="only calls whose names begin so, such as 'fused backward'")
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=TARGETS)
    parser.add_argument("--size", nargs="+", type=int, default=SIZES, help="of the hidden states")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was counted to this file")
    chosen = parser.parse_args(argv)
    records = run(chosen.target, chosen.size, chosen.who, chosen.call)
    show(records)
    if chosen.json:
        chosen.json.write_text(json.dumps(records, indent=1))
