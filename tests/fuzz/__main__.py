"""``python tests/fuzz [--short] [--output FILE]``: what nobody means to give, in every way in.

Each input is made from a seed and its number. It has to be accepted or refused in one printable line: a traceback, a
process that ends, or an input that takes a minute is a failure. ``--kind NAME --first N --count 1`` makes one again.
The whole campaign is written into ``recorded.json``, unless another file is given.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import platform
import shutil
import sys
import time
import traceback
from collections import Counter
from contextlib import redirect_stdout
from datetime import date
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["OMP_NUM_THREADS"] = "1"  # and a fork of threads is none
os.environ["PROCON_CACHE"] = "/nonexistent"  # nothing is fetched

from kinds import FOLDER, KINDS, Kind
from readers import unreached

from procon.errors import ProConError

#: Of the whole campaign, this share of each kind is the short form, and one input at least.
SHORT = 1000

#: Seconds for one input; the slowest that is in order needs a tenth of it on a busy machine.
LONGEST = 60.0

#: Inputs that one process takes.
CHUNK = 500

OUTCOMES = ("accepted", "refused", "traceback", "crash", "hang")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python tests/fuzz", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--short", action="store_true", help=f"of each kind the first of {SHORT}: a few seconds")
    parser.add_argument("--output", type=Path, help="the file to write (default: recorded.json; none if it is short)")
    parser.add_argument("--readers", action="store_true", help="name readers of the library that no input reaches")
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--first", type=int, default=0, help="number of the first input of each kind")
    parser.add_argument("--count", type=int, help="inputs of each kind (default: as many as the kind says)")
    return parser.parse_args()


def outcome(kind: Kind, name: str, number: int) -> tuple[str, str]:
    """What becomes of input ``number``, and why."""
    try:
        kind.take(kind.make(Random(f"{name} {number}")))
    except ProConError as error:
        line = str(error)
        if not line.isprintable() or not 0 < len(line) <= 20_000:
            return "traceback", f"the error is no printable line: {line!r:.300}"
        return "refused", ""
    except BaseException:  # SystemExit would end the process
        return "traceback", traceback.format_exc(limit=-4)
    return "accepted", ""


def work(kind: Kind, name: str, numbers: range, results: Connection) -> None:
    """In a process of its own: what becomes of each input."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    sys.stdout = sys.stderr = open(os.devnull, "w", errors="backslashreplace")  # noqa: SIM115  # to the end
    for number in numbers:
        results.send(outcome(kind, name, number))


def run(kind: Kind, name: str, first: int, count: int) -> tuple[Counter[str], list[tuple[int, str, str]]]:
    """Outcomes of the inputs, and the numbers and reasons of the bad ones."""
    outcomes, failures, number = Counter(), [], first
    while number < first + count:
        results, sending = multiprocessing.Pipe(duplex=False)
        numbers = range(number, min(first + count, number + CHUNK))
        process = multiprocessing.get_context("fork").Process(target=work, args=(kind, name, numbers, sending))
        process.start()
        sending.close()
        for number in numbers:
            try:
                result, reason = results.recv() if results.poll(LONGEST) else ("hang", f"{LONGEST} seconds")
            except EOFError:
                result, reason = "crash", "the process ended"
            outcomes[result] += 1
            if result not in ("accepted", "refused"):
                failures.append((number, result, reason))
            if result in ("hang", "crash"):
                process.kill()
                break
        process.join()
        number += 1
        print(f"\r{name}: {number - first} of {count}", end="", file=sys.stderr, flush=True)
    return outcomes, failures


def main() -> int:
    chosen = arguments()
    os.chdir(FOLDER)  # where what commands are told to write would be
    if chosen.readers:
        with redirect_stdout(io.StringIO()):
            missed = unreached(KINDS, outcome)
        print(*missed, sep="\n")
        return 1 if missed else 0
    rows, failed = [], 0
    for name in chosen.kind:
        kind, began = KINDS[name], time.monotonic()
        count = chosen.count or (max(1, kind.count // SHORT) if chosen.short else kind.count)
        outcomes, failures = run(kind, name, chosen.first, count)
        rows.append({"input": name, "inputs": outcomes.total(), **{result: outcomes[result] for result in OUTCOMES}})
        rows[-1]["seconds"] = round(time.monotonic() - began, 1)
        print(f"\r{rows[-1]}", file=sys.stderr)
        for number, result, reason in failures[:5]:
            print(f"{name!r} {number}: {result}: {reason}", file=sys.stderr)
        failed += len(failures)
    whole = not (chosen.short or chosen.count or chosen.first or chosen.kind != list(KINDS))
    output = chosen.output or (Path(__file__).with_name("recorded.json") if whole else None)
    if output:
        made = {
            "date": date.today().isoformat(),
            "python": platform.python_version(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            **{package: version(package) for package in ("torch", "transformers", "datasets", "pyarrow", "pyyaml")},
        }
        total = {"input": "sum", **{key: sum(row[key] for row in rows) for key in rows[0] if key != "input"}}
        total["seconds"] = round(total["seconds"], 1)
        record = {"command": "python tests/fuzz", "made": made, "rows": [*rows, total]}
        output.write_text(json.dumps(record, indent=1) + "\n")
    shutil.rmtree(FOLDER, ignore_errors=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
