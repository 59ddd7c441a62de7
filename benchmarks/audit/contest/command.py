"""``python -m benchmarks.audit contest``: count, show, record, and make the page."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from itertools import product
from pathlib import Path

from benchmarks.audit.contest import SHAPES, WHO, run, show
from benchmarks.audit.contest.cards import CARDS
from benchmarks.audit.contest.page import PAGE, page
from benchmarks.audit.contest.record import SIDES, keep, kept
from benchmarks.harness.checkouts import checked_out


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.audit contest",
        description="Our kernels and those of others, compiled for the same GPUs and counted. No GPU is needed.",
    )
    parser.add_argument("--who", nargs="+", choices=tuple(WHO))
    parser.add_argument("--call", default="", help="only calls whose names begin so, such as 'fused backward'")
    parser.add_argument("--target", nargs="+", choices=tuple(CARDS), help="with --size and --rows: these shapes")
    parser.add_argument("--size", nargs="+", type=int, help="of the hidden states")
    parser.add_argument("--rows", nargs="+", type=int, default=[16384], help="as above (16384)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was counted to this file")
    parser.add_argument("--commit", help="our kernels as of this commit")
    parser.add_argument("--record", choices=SIDES, help="keep all that is counted of this side, and make the page")
    parser.add_argument("--page", action="store_true", help="nothing is counted: make the page of what was recorded")
    parser.add_argument("--recorded", action="store_true", help="nothing is counted: show all that was recorded")
    chosen = parser.parse_args(argv)
    if chosen.page:
        PAGE.write_text(page({side: kept(side) for side in SIDES}))
        return
    if chosen.recorded:
        for side in SIDES:
            print(side)
            show((kept(side) or {"records": []})["records"])
        return
    if bool(chosen.target) != bool(chosen.size):
        parser.error("--target and --size choose shapes together")
    if chosen.record and (chosen.who or chosen.call or chosen.target):
        parser.error("--record keeps the whole of a side: leave out --who, --call, --target and --size")
    if chosen.commit and chosen.record == "peers":
        parser.error("--commit is of our kernels: record 'before' or 'after' with it")
    who = SIDES[chosen.record] if chosen.record else chosen.who or (("ours",) if chosen.commit else tuple(WHO))
    if chosen.commit:
        shapes = []
        if chosen.target:
            numbers = ["--size", *map(str, chosen.size), "--rows", *map(str, chosen.rows)]
            shapes = ["--target", *chosen.target, *numbers]
        records = _of_commit(chosen.commit, ["--who", *who, "--call", chosen.call, *shapes])
    else:
        shapes = list(product(chosen.target, chosen.size, chosen.rows)) if chosen.target else SHAPES
        records = run(shapes, who, chosen.call)
        show(records)
    if chosen.json:
        chosen.json.write_text(json.dumps(records, indent=1))
    if chosen.record:
        keep(chosen.record, records, chosen.commit)
        PAGE.write_text(page({side: kept(side) for side in SIDES}))


def _of_commit(commit: str, arguments: list[str]) -> list[dict]:
    """Counted by a process that imports the library as of ``commit``."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        path, file = checked_out(commit, Path(folder), stack), Path(folder) / "records.json"
        command = [sys.executable, "-P", "-m", "benchmarks.audit", "contest", "--json", file, *arguments]
        subprocess.run(command, env=os.environ | {"PYTHONPATH": str(path)}, cwd=folder, check=True)
        return json.loads(file.read_text())
