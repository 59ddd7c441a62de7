"""``python tests/faults [--only NAME...] [--kinds KIND...] [--short] [--output FILE]``: a fault at every call.

A call is one that changes files: open for writing, write, truncate, sync, rename, link, unlink, mkdir or rmdir, by
whichever library. The points that are done stand in FILE.points.jsonl: an interrupted campaign goes on from there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["ACCELERATE_USE_CPU"] = "true"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import datasets
import points
import shim
import torch
from operations import Place

import procon

HERE = Path(__file__).parent
RECORD = HERE / "recorded.json"

#: What the short form tries: what is quick, at every call.
SHORT = ("directions, over an old file", "anchors, 1 rank")
SHORT_LIMIT = 12


def digest() -> str:
    """Of the library and of this harness: points of others are not these."""
    found = hashlib.sha256()
    for folder in (Path(procon.__file__).parent, HERE):
        for file in sorted([*folder.rglob("*.py"), *folder.rglob("*.c")]):
            found.update(file.read_bytes())
    return found.hexdigest()[:16]


class Log:
    """The points that are done, in a file beside the record, for a campaign that is interrupted."""

    def __init__(self, file: Path) -> None:
        self._file = file
        first = json.dumps({"digest": digest()}) + "\n"
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        if lines[:1] != [first]:
            lines = [first]
            file.write_text(first)
        whole = [points.Point(**json.loads(line)) for line in lines[1:] if line.endswith("\n")]
        self._done = {point.key: point for point in whole}

    def run(self, bench: points.Bench, point: points.Point) -> points.Point:
        """The point, run unless it is there."""
        if point.key not in self._done:
            self._done[point.key] = bench.run(point)
            with self._file.open("a") as file:
                file.write(points.to_line(self._done[point.key]))
        return self._done[point.key]


class Progress:
    """One line that is written over, and a line for each point that is bad."""

    def __init__(self) -> None:
        self.points = self.bad = 0
        self._began = time.monotonic()

    def show(self, point: points.Point) -> None:
        self.points += 1
        if point.bad:
            self.bad += 1
            which = " ".join(filter(None, (point.kind, point.state)))
            print(
                f"\r{point.operation}, {which}, rank {point.rank}, {point.n} ({point.call}): {point.bad}",
                file=sys.stderr,
            )
        seconds = time.monotonic() - self._began
        text = f"\r{point.operation}, {point.kind}: {self.points} points, {self.bad} bad, {seconds:.0f} s"
        print(f"{text:<79}", end="", file=sys.stderr, flush=True)


def row(bench: points.Bench, kind: str, tried: list[points.Point]) -> dict:
    """A row of the table."""
    of = bench.count(kind)
    return {
        "operation": bench.operation.name,
        "fault": points.FAULTS[kind],
        "points": len(tried),
        "which": "every one" if len(tried) == of else f"of {of}, drawn",
        "mixtures": sum(bool(point.mixture) for point in tried),
        "losses": sum(bool(point.loss) for point in tried),
        "resumes that differ": sum(bool(point.differs) for point in tried),
        "leftovers": sum(bool(point.leftover) for point in tried),
        "tracebacks": sum(bool(point.traceback) for point in tried),
    }


def write_record(file: Path, command: str, rows: list[dict], names: list[str]) -> None:
    """Rows of operations that were not run stay as they were recorded."""
    run = {(row["operation"], row["fault"]) for row in rows}
    kept = json.loads(file.read_text())["rows"] if file.exists() else []
    rows = [row for row in kept if row["operation"] in names and (row["operation"], row["fault"]) not in run] + rows
    faults = list(points.FAULTS.values())
    rows.sort(key=lambda row: (names.index(row["operation"]), faults.index(row["fault"])))
    made = {
        "date": date.today().isoformat(),
        "python": platform.python_version(),
        **{package: version(package).split("+")[0] for package in ("torch", "transformers", "peft", "safetensors")},
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
    }
    file.write_text(json.dumps({"command": command, "made": made, "rows": rows}, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="operations, by a part of their name")
    parser.add_argument("--kinds", nargs="+", choices=list(points.FAULTS), default=list(points.FAULTS))
    parser.add_argument(
        "--limit", type=int, help="points of each operation and kind; else as many as operations.py says"
    )
    parser.add_argument("--short", action="store_true", help=f"{' and '.join(SHORT)}, {SHORT_LIMIT} of a kind")
    parser.add_argument("--output", type=Path, default=RECORD)
    chosen = parser.parse_args()
    if reason := shim.missing():
        parser.error(reason)
    shim.build()
    torch.set_num_threads(1)
    wanted = SHORT if chosen.short else chosen.only
    limit = SHORT_LIMIT if chosen.short else chosen.limit
    log, progress, rows = Log(chosen.output.with_suffix(".points.jsonl")), Progress(), []
    with tempfile.TemporaryDirectory(prefix="procon-faults-") as temporary:
        folder = Path(temporary).resolve()
        datasets.config.HF_DATASETS_CACHE = folder / "datasets"
        operations = Place(folder).operations()
        names = [operation.name for operation in operations]
        if wanted and not any(part in name for name in names for part in wanted):
            parser.error(f"there is no operation of that name: there are {', '.join(names)}")
        for operation in operations:
            if wanted and not any(part in operation.name for part in wanted):
                continue
            bench = points.Bench(operation, folder / "bench")
            bench.prepare()
            for kind in chosen.kinds:
                tried = []
                for point in bench.points(kind, limit or operation.limit):
                    found = log.run(bench, point)
                    progress.show(found)
                    if found.reached:
                        tried.append(found)
                rows.append(row(bench, kind, tried))
    print(file=sys.stderr)
    write_record(chosen.output, "python tests/faults" + (" --short" if chosen.short else ""), rows, names)
    print(f"{progress.points} points, {progress.bad} bad: {chosen.output}")
    return 1 if progress.bad else 0


sys.exit(main())
