"""``python tests/fuzz [--short] [--output FILE]``: what nobody means to give, in every way in.

Each input is made from a seed and its number. It has to be accepted or refused in one printable line: a traceback, a
process that ends, or an input that takes a minute is a failure. ``--kind NAME --first N --count 1`` makes one again.
The whole campaign, or a kind of it as a whole, is written into ``recorded.json`` unless another file is given.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import shutil
import sys
from contextlib import redirect_stdout
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["OMP_NUM_THREADS"] = "1"  # and a fork of threads is none
os.environ["PROCON_CACHE"] = "/nonexistent"  # nothing is fetched

from campaign import OUTCOMES, Found, Kind, run
from kinds import FOLDER, KINDS
from readers import unreached

#: Of the whole campaign, this share of each kind is the short form, and one input at least.
SHORT = 1000


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python tests/fuzz", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--short", action="store_true", help=f"of each kind the first of {SHORT}: a few seconds")
    parser.add_argument("--output", type=Path, help="the file to write (default: recorded.json; none if it is short)")
    parser.add_argument("--readers", action="store_true", help="name readers of the library that no input reaches")
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--first", type=int, default=0, help="number of the first input of each kind")
    parser.add_argument("--count", type=int, help="inputs of each kind (default: as many as the kind says)")
    return parser.parse_args()


def row(name: str, found: Found, base: int) -> dict[str, Any]:
    return {
        "input": name,
        "inputs": found.outcomes.total(),
        **{result: found.outcomes[result] for result in OUTCOMES},
        "peak memory above the start (MiB)": max(0, found.memory - base) // 2**20,
        "seconds": round(found.seconds, 1),
    }


def total(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Their sum; of memory, the most."""
    found = {
        key: (max if key.startswith("peak") else sum)(row[key] for row in rows) for key in rows[0] if key != "input"
    }
    return {"input": "sum", **found, "seconds": round(found["seconds"], 1)}


def kept(output: Path, again: set[str]) -> list[dict[str, Any]]:
    """The rows of an earlier record that were not made again, of the kinds that there still are."""
    rows = json.loads(output.read_text())["rows"] if output.exists() else []
    return [row for row in rows if row["input"] in KINDS.keys() - again]


def main() -> int:
    chosen = arguments()
    os.chdir(FOLDER)  # where what commands are told to write would be
    if chosen.readers:
        with redirect_stdout(io.StringIO()):
            missed = unreached(KINDS)
        print(*missed, sep="\n")
        return 1 if missed else 0
    base = run(Kind(lambda _: None, lambda _: None, 1), "nothing", 0, 1, lambda done: None).memory
    rows, failed = [], 0
    for name in chosen.kind:
        kind = KINDS[name]
        count = chosen.count or (max(1, kind.count // SHORT) if chosen.short else kind.count)

        def show(done: int, name: str = name, count: int = count) -> None:
            print(f"\r{name}: {done} of {count}", end="", file=sys.stderr, flush=True)

        found = run(kind, name, chosen.first, count, show)
        rows.append(row(name, found, base))
        print(f"\r{rows[-1]}", file=sys.stderr)
        for number, result, reason in found.failures[:5]:
            print(f"{name!r} {number}: {result}: {reason}", file=sys.stderr)
        failed += len(found.failures)
    whole = not (chosen.short or chosen.count or chosen.first)
    output = chosen.output or (Path(__file__).with_name("recorded.json") if whole else None)
    if output:
        rows = [*kept(output, {each["input"] for each in rows}), *rows]
        made = {
            "date": date.today().isoformat(),
            "python": platform.python_version(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "memory at the start (MiB)": base // 2**20,
            **{package: version(package) for package in ("torch", "transformers", "datasets", "pyarrow", "pyyaml")},
        }
        rows = sorted(rows, key=lambda each: list(KINDS).index(each["input"]))
        record = {"command": "python tests/fuzz", "made": made, "rows": [*rows, total(rows)]}
        output.write_text(json.dumps(record, indent=1) + "\n")
    print(total(rows), file=sys.stderr)
    shutil.rmtree(FOLDER, ignore_errors=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
