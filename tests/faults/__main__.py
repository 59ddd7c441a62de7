"""``python tests/faults [--only NAME...] [--points N] [--output FILE]``: faults in what writes files.

It needs Linux. Nothing may come of a fault but what was there before, what should be there after, or a refusal.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # a process with threads cannot be forked
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
from campaign import BAD, FAULTS, Bench
from operations import OPERATIONS


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=[operation.name for operation in OPERATIONS])
    parser.add_argument("--points", type=int, default=10, help="of each operation and fault; a fifth of training")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "recorded.json")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory(prefix="procon-faults-") as folder:
        for operation in OPERATIONS:
            if chosen.only and operation.name not in chosen.only:
                continue
            bench = Bench(operation, Path(folder).resolve() / operation.name)
            points = chosen.points if operation.name != "training" else max(1, chosen.points // 5)
            for fault in FAULTS:
                rows.append(bench.row(fault, points))
                print(*rows[-1].values(), sep=", ", flush=True)
    names = {row["operation"] for row in rows}
    kept = json.loads(chosen.output.read_text())["rows"] if chosen.only and chosen.output.exists() else []
    rows = [row for row in kept if row["operation"] not in names] + [row for row in rows if row["points"]]
    packages = ("torch", "transformers", "safetensors")
    made = {
        "date": date.today().isoformat(),
        "python": platform.python_version(),
        **{package: version(package).split("+")[0] for package in packages},
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
    }
    record = {"command": "python tests/faults", "made": made, "rows": rows}
    chosen.output.write_text(json.dumps(record, indent=1) + "\n")
    bad = sum(row[outcome] for row in rows for outcome in BAD)
    print(f"{sum(row['points'] for row in rows)} faults, {bad} bad")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
