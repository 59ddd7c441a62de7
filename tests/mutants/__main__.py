"""``python tests/mutants [--module procon/schedule.py]``: do the tests notice when the code is changed?

Each mutant is the code with one change. The tests that run its line are run on it, in a fork, until one fails: then it
is killed. One that survives is a change that no test notices: a test is missing, or it stands in ``survivors.toml``
with the reason why it changes nothing that a test could see. Tests that are marked slow are left out, and lines count
as run only if the process of the tests runs them: what ranks in processes of their own do is not seen.

What is done is kept in ``.mutants/``: run it again to go on. A mutant is run again when its function has changed, a
survivor also when a test has, or has more seconds. Results are written to ``recorded.json``.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import platform
import random
import sys
import tempfile
import time
import tomllib
from collections import Counter
from datetime import date
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["OMP_NUM_THREADS"] = "1"  # and a fork of threads is none

from forked import baseline, in_child, killer, warm_up
from mutations import Mutant, mutants

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

#: What is mutated, and the tests that are to notice. A room's tests come first; others use what it offers.
ROOMS = {
    "procon/schedule.py": ["tests/test_schedule.py"],
    "procon/sequences.py": ["tests/test_sequences.py", "tests/anchors"],
    "procon/eager": ["tests/ops"],
    "procon/ops": ["tests/ops"],
    "procon/constraint": ["tests/constraint"],
    "procon/anchors": ["tests/anchors"],
    "procon/directions": ["tests/directions"],
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python tests/mutants", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--module", nargs="+", default=[], help="a file, or a folder of them (default: all)")
    parser.add_argument("--tests", nargs="+", help="the tests that are to notice (default: its own)")
    parser.add_argument("--sample", type=int, metavar="N", help="of each module, N mutants by chance (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--seconds", type=float, default=30, help="of tests for each mutant; the quickest of them run")
    parser.add_argument("--coverage-only", action="store_true", help="branch coverage, and no mutants")
    parser.add_argument("--root", type=Path, default=ROOT, help="of the code and its tests")
    parser.add_argument("--output", type=Path, default=HERE / "recorded.json", metavar="FILE")
    parser.add_argument("--survivors", type=Path, default=HERE / "survivors.toml", metavar="FILE")
    chosen = parser.parse_args()
    chosen.root = chosen.root.resolve()
    return chosen


def sha(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def python_files(root: Path, places: list[str]) -> list[str]:
    """Files at these places; the doors of rooms have nothing to mutate."""
    found = []
    for place in places:
        path = root / place
        files = sorted(path.rglob("*.py")) if path.is_dir() else [path] * path.exists()
        found += [str(file.relative_to(root)) for file in files if file.name != "__init__.py"]
    return found


def listed_survivors(file: Path) -> dict[tuple, dict]:
    """By file and key of the mutant."""
    entries = tomllib.loads(file.read_text(encoding="utf-8")).get("survivor", []) if file.exists() else []
    return {
        (entry["file"], entry["function"], entry["before"], entry["after"], entry.get("number", 1)): entry
        for entry in entries
    }


def statement_lines(tree: ast.Module, line: int) -> range:
    """Lines of the innermost statement at ``line``; of a compound one, its head; all of a function for its ``def``."""
    around = [node for node in ast.walk(tree) if isinstance(node, ast.stmt) and node.lineno <= line <= node.end_lineno]
    if not around:
        return range(0)
    node = max(around, key=lambda node: (node.lineno, -node.end_lineno))
    body = getattr(node, "body", None)
    if isinstance(node, ast.FunctionDef | ast.ClassDef) or not body:
        return range(node.lineno, node.end_lineno + 1)
    return range(node.lineno, max(node.lineno + 1, body[0].lineno))


def by_function(source: str) -> dict[str, str]:
    """The text of each function, by the name that a mutant gives; under "", the whole file."""
    found = {"": source}

    def visit(node: ast.AST, names: tuple[str, ...]) -> None:
        for child in ast.iter_child_nodes(node):
            inner = names
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                inner = (*names, child.name)
                name = ".".join(inner)
                found[name] = found.get(name, "") + (ast.get_source_segment(source, child) or "")
            visit(child, inner)

    visit(ast.parse(source), ())
    return found


class Room:
    """One row of the record: files, their tests, and what became of the mutants."""

    def __init__(self, name: str, tests: list[str], chosen: argparse.Namespace, scratch: Path) -> None:
        self.name, self.root, self.scratch, self.seconds = name, chosen.root, scratch, chosen.seconds
        self.files = python_files(self.root, [name])
        self.sources = {file: (self.root / file).read_text(encoding="utf-8") for file in self.files}
        self.trees = {file: ast.parse(source) for file, source in self.sources.items()}
        self.functions = {file: by_function(source) for file, source in self.sources.items()}
        tested = [*python_files(self.root, tests), *python_files(self.root, ["tests/conftest.py"])]
        self.tests = [test for test in tests if (self.root / test).exists()]
        self.tests_hash = sha(*((self.root / test).read_text(encoding="utf-8") for test in tested))
        self.kills = Counter()
        self.base = self._baseline()

    def _baseline(self) -> dict:
        """Rooms of the same tests share one run of them."""
        alike = [name for name, tests in ROOMS.items() if tests == self.tests and self.name in ROOMS] or [self.name]
        files = python_files(self.root, alike)
        cache = self.root / ".mutants" / f"{sha(*alike)}.baseline.json"
        key = sha(self.tests_hash, *((self.root / file).read_text(encoding="utf-8") for file in files))
        if not cache.exists() or json.loads(cache.read_text())["key"] != key:
            found = in_child(lambda: baseline(self.root, files, [*self.tests, "-m", "not slow"], self.scratch), 3600)
            if not found or not found["tests"]:
                sys.exit(f"{self.name}: no test of {self.tests} passes")
            cache.parent.mkdir(exist_ok=True)
            cache.write_text(json.dumps({"key": key, **found}))
        return json.loads(cache.read_text())

    def tests_of(self, mutant: Mutant) -> list[str]:
        """Those that run its statement, the likeliest to notice first, within the time for one mutant."""
        by_line = self.base["lines"][mutant.file]
        lines = [str(line) for line in statement_lines(self.trees[mutant.file], mutant.line)]
        found = {test for line in lines for test in by_line.get(line, [])}
        if not found and any(line in by_line for line in lines):  # run on import
            found = {test for run_by in by_line.values() for test in run_by}
        cost = self.base["tests"]
        chosen, total = [], 0.0
        for test in sorted(found & cost.keys(), key=lambda test: (-self.kills[mutant.file, test], cost[test])):
            total += cost[test]
            if chosen and total > self.seconds:
                break
            chosen.append(test)
        return chosen

    def run(self, mutant: Mutant) -> tuple[str, str]:
        """``("killed", test)``, ``("timed out", "")`` or ``("survived", "")``."""
        tests = self.tests_of(mutant)
        if not tests:
            return "survived", "no test runs it"
        # The first few kill most; a whole list takes a while to collect.
        for part in (tests[:8], tests[8:]):
            if not part:
                continue
            limit = 30 + 5 * sum(self.base["tests"][test] for test in part)
            test = in_child(lambda part=part: killer(self.root, mutant.file, mutant.source, part, self.scratch), limit)
            if test is None:
                return "timed out", ""
            if test:
                self.kills[mutant.file, test] += 1
                return "killed", test
        return "survived", ""


def wilson(hits: int, trials: int) -> list[float]:
    """95% interval of a proportion."""
    z = 1.96
    middle, spread = hits + z * z / 2, z * (hits * (trials - hits) / trials + z * z / 4) ** 0.5
    return [round((middle + sign * spread) / (trials + z * z), 3) for sign in (-1, 1)]


def campaign(room: Room, chosen: argparse.Namespace) -> tuple[dict, list[str]]:
    """The room's row of the record, and what survived."""
    listed = listed_survivors(chosen.survivors)
    every = [mutant for file, source in room.sources.items() for mutant in mutants(file, source)]
    there = {(mutant.file, *mutant.key) for mutant in every}
    for gone in [key for key in listed if key[0] in room.files and key not in there]:
        print(f"{chosen.survivors.name} lists a mutant that is none any more: {gone}", file=sys.stderr)
    picked = every
    if chosen.sample and chosen.sample < len(every):
        picked = random.Random(chosen.seed).sample(every, chosen.sample)
    log = room.root / ".mutants" / f"{room.name.replace('/', '-')}.jsonl"
    done = {}
    if log.exists():
        for line in log.read_text().splitlines():
            entry = json.loads(line)
            done[tuple(entry["key"])] = entry
    counts, reasons, survivors, start = Counter(), Counter(), [], time.monotonic()
    with log.open("a") as stream:
        for number, mutant in enumerate(picked, 1):
            if reason := listed.get((mutant.file, *mutant.key)):
                reasons[reason["reason"]] += 1
                continue
            key = (mutant.file, sha(room.functions[mutant.file][mutant.function]), *mutant.key)
            entry = done.get(key)
            if entry is None or (entry["outcome"] == "survived" and entry["tests"] != [room.tests_hash, room.seconds]):
                outcome, test = room.run(mutant)
                tried = [room.tests_hash, room.seconds]
                entry = {"key": key, "line": mutant.line, "outcome": outcome, "by": test, "tests": tried}
                stream.write(json.dumps(entry) + "\n")
                stream.flush()
            counts[entry["outcome"]] += 1
            if entry["outcome"] == "survived":
                survivors.append(mutant)
                print(f"\n{mutant.file}:{mutant.line} survived {entry['by']}\n- {mutant.before}\n+ {mutant.after}")
            took = time.monotonic() - start
            print(f"\r{room.name}: {number} of {len(picked)}, {dict(counts)}, {took:.0f} s", end="", file=sys.stderr)
    print(file=sys.stderr)
    noticed, run = counts["killed"] + counts["timed out"], counts.total()
    command = f"python tests/mutants --module {room.name} --seconds {room.seconds:g}"
    sampled = len(picked) < len(every)
    row = {
        "module": room.name,
        "mutants": len(every),
        "tried": len(picked),
        "killed": counts["killed"],
        "timed out": counts["timed out"],
        "survived": counts["survived"],
        "listed": ", ".join(f"{number} {reason}" for reason, number in sorted(reasons.items())) or "0",
        "score": round(noticed / max(1, run), 4),
        "95% interval": " to ".join(map(str, wilson(noticed, run))) if sampled else "all tried",
        "score without the list": round(noticed / max(1, len(picked)), 4),
        "command": command + (f" --sample {chosen.sample} --seed {chosen.seed}" if sampled else ""),
    }
    return row, [f"{m.file}, {m.function}: {m.before} -> {m.after}" for m in survivors]


def branch_coverage(room: Room) -> dict:
    taken, there = (sum(each[n] for each in map(room.base["branches"].get, room.files)) for n in (0, 1))
    return {"branches": there, "branches taken": taken, "branch coverage": round(taken / there, 4) if there else 1.0}


def main() -> None:
    os.nice(19 - os.nice(0))
    chosen = arguments()
    os.chdir(chosen.root)
    rooms = {name: chosen.tests or ROOMS.get(name, []) for name in chosen.module or ROOMS}
    record = json.loads(chosen.output.read_text()) if chosen.output.exists() else {"rows": [], "survivors": {}}
    rows, survivors = {row["module"]: row for row in record["rows"]}, record["survivors"]
    with tempfile.TemporaryDirectory() as scratch:
        for name, tests in rooms.items():
            room = Room(name, tests, chosen, Path(scratch) / "tests")
            if skipped := room.base["skipped"]:
                print(f"{name}: left out, as they do not pass here: {', '.join(skipped)}", file=sys.stderr)
            row = rows.get(name, {"module": name})
            if not chosen.coverage_only:
                warm_up(room.base["modules"])
                row, survivors[name] = campaign(room, chosen)
            rows[name] = row | branch_coverage(room)
            print(json.dumps(rows[name]), flush=True)
            made = {
                "date": date.today().isoformat(),
                "python": platform.python_version(),
                **{package: version(package).split("+")[0] for package in ("torch", "mutmut", "coverage")},
                "machine": f"{os.cpu_count()} cores, {platform.machine()}, no GPU",
            }
            kept = [rows[row] for row in [*ROOMS, *(row for row in rows if row not in ROOMS)] if row in rows]
            content = {"command": "python tests/mutants", "made": made, "rows": kept, "survivors": survivors}
            chosen.output.write_text(json.dumps(content, indent=1) + "\n")


main()
