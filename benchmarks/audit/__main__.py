"""Run the audits: ``python -m benchmarks.audit [traffic | builds | live-bytes | passes | contest] [--json FILE]``."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path

# The installed procon comes first: in the source tree, the kernels lie beside procon and not inside it.
sys.path.append(sys.path.pop(0))

#: Those that run if none is named. The contest takes minutes, and has a record.
AUDITS = ("traffic", "builds", "live-bytes")
#: By itself: it takes a long time, and needs ttsem.
LONG = "passes"
BUILT = ("builds", LONG)
SIZED = ("traffic", *BUILT)
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


def run_one(name: str, targets: list[str], sizes: list[int] | None, every: bool) -> list[dict]:
    # Triton chooses between compiler and interpreter when a kernel is declared.
    os.environ.pop("TRITON_INTERPRET", None)
    if name == "traffic":
        os.environ["TRITON_INTERPRET"] = "1"
    audit = import_module(f"benchmarks.audit.{name.replace('-', '_')}")
    options = {"every": True} if every else {}
    given = (targets, sizes) if name in BUILT else (sizes,) if name == "traffic" else ()
    records = audit.run(*given, **options)
    audit.show(records, **options)
    return records


def run_all(targets: list[str], sizes: list[int] | None) -> dict[str, list[dict]]:
    """Each audit in a process of its own."""
    records = {}
    for name in AUDITS:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "records.json"
            command = [sys.executable, "-m", "benchmarks.audit", name, "--json", str(file)]
            for target in targets if name == "builds" else []:
                command += ["--target", target]
            for size in (sizes or []) if name in SIZED else []:
                command += ["--size", str(size)]
            subprocess.run(command, check=True)
            records[name] = json.loads(file.read_text())
    return records


def main() -> None:
    if sys.argv[1:2] == ["contest"]:
        os.environ.pop("TRITON_INTERPRET", None)
        import_module("benchmarks.audit.contest.command").main(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(prog="python -m benchmarks.audit", description="Costs that need no GPU to count.")
    parser.add_argument(
        "audit", nargs="?", choices=(*AUDITS, LONG, "contest"), help="one audit (default: the first three)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all records to this file")
    for_one = "{}: for this {} only; may be repeated"
    parser.add_argument("--target", action="append", choices=TARGETS, help=for_one.format("builds and passes", "GPU"))
    parser.add_argument("--size", action="append", type=int, help=for_one.format("all but live-bytes", "hidden size"))
    parser.add_argument(
        "--every", action="store_true", help="builds: every size and number of directions, and what spills (hours)"
    )
    arguments = parser.parse_args()
    if arguments.every and arguments.audit != "builds":
        parser.error("--every is of builds")
    targets = arguments.target or list(TARGETS)
    sizes = arguments.size
    records = run_one(arguments.audit, targets, sizes, arguments.every) if arguments.audit else run_all(targets, sizes)
    if arguments.json:
        arguments.json.write_text(json.dumps(records, indent=1))


if __name__ == "__main__":
    main()
