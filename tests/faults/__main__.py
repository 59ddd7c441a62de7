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

os.environ |= {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
_WORK = tempfile.TemporaryDirectory(prefix="procon-faults-")
os.environ["HF_DATASETS_CACHE"] = f"{_WORK.name}/datasets"

import points
import shim

if reason := shim.missing():
    sys.exit(reason)
shim.build()

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


def row(bench: points.Bench, kind: str, tried: list[points.Point]) -> dict:
    of = bench.count(kind)
    counted = {
        "mixtures": sum(bool(point.mixture) for point in tried),
        "losses": sum(bool(point.loss) for point in tried),
        "resumes that differ": sum(bool(point.differs) for point in tried),
        "leftovers": sum(bool(point.leftover) for point in tried),
        "tracebacks": sum(bool(point.traceback) for point in tried),
    }
    every = "every" if len(tried) == of else f"{len(tried)} of {of}, drawn"
    return {"operation": bench.operation.name, "fault": points.FAULTS[kind], "points": len(tried), "which": every} | counted


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", help="operations, by a part of their name")
    parser.add_argument("--kinds", nargs="+", choices=list(points.FAULTS), default=list(points.FAULTS))
    parser.add_argument("--limit", type=int, default=10**6, help="points of each operation and kind, at most")
    parser.add_argument("--short", action="store_true", help=f"{' and '.join(SHORT)}, {SHORT_LIMIT} of a kind")
    parser.add_argument("--output", type=Path, default=RECORD)
    chosen = parser.parse_args()
    wanted = SHORT if chosen.short else chosen.only
    limit = min(chosen.limit, SHORT_LIMIT) if chosen.short else chosen.limit
    torch.set_num_threads(1)
    folder = Path(_WORK.name).resolve()
    place = Place(folder)
    operations = [
        found for found in place.operations() if not wanted or any(part in found.name for part in wanted)
    ]
    if not operations:
        parser.error(f"no operation of that name: there are {', '.join(found.name for found in place.operations())}")

    log = chosen.output.with_suffix(".points.jsonl")
    version_line = json.dumps({"digest": digest()}) + "\n"
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    if lines[:1] != [version_line]:
        lines = [version_line]
        log.write_text(version_line)
    done = {point.key: point for point in (points.Point(**json.loads(line)) for line in lines[1:] if line.endswith("\n"))}
    rows, bad, began, number = [], 0, time.monotonic(), 0
    for operation in operations:
        bench = points.Bench(operation, folder / "bench")
        bench.prepare()
        for kind in chosen.kinds:
            tried = []
            for point in bench.points([kind], min(limit, operation.limit)):
                number += 1
                found = done.get(point.key)
                if found is None:
                    found = bench.run(point)
                    with log.open("a") as file:
                        file.write(points.to_line(found))
                if found.bad:
                    bad += 1
                    where = f"{found.operation}, {found.kind} {found.state}, rank {found.rank}, {found.n} ({found.call})"
                    print(f"\r{where}: {found.bad}", file=sys.stderr)
                print(
                    f"\r{operation.name}, {kind}: {number} points, {bad} bad, {time.monotonic() - began:.0f} s  ",
                    end="",
                    file=sys.stderr,
                    flush=True,
                )
                tried.append(found)
            if tried:
                rows.append(row(bench, kind, tried))
    print(file=sys.stderr)
    made = {
        "date": date.today().isoformat(),
        "python": platform.python_version(),
        **{package: version(package).split("+")[0] for package in ("torch", "transformers", "peft", "safetensors")},
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
    }
    record = {"command": "python tests/faults" + (" --short" if chosen.short else ""), "made": made, "rows": rows}
    chosen.output.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{number} points, {bad} bad: {chosen.output}")
    return 1 if bad else 0


sys.exit(main())
