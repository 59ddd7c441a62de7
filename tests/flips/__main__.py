"""``python tests/flips [--short] [--output FILE]``: damage every file that the library writes, and record what comes.

Nothing may come but a refusal, what was damaged mended with a warning, or exactly what there was before.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton

from campaign import FLIPS, failures, run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true", help="a few bits of each region")
    parser.add_argument("--flips", type=int, default=FLIPS, help="bits per region")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "recorded.json")
    chosen = parser.parse_args()
    began = time.monotonic()
    rows = run(8, 4) if chosen.short else run(chosen.flips)
    made = {
        "date": date.today().isoformat(),
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "transformers", "safetensors", "numpy", "xxhash")},
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "seconds": round(time.monotonic() - began),
    }
    if not chosen.short:
        command = "python tests/flips"
        content = {"command": command, "made": made, "rows": rows}
        chosen.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"{sum(row['tried'] for row in rows)} damaged files, {len(failures(rows))} rows with something wrong")
    return 1 if failures(rows) else 0


if __name__ == "__main__":
    sys.exit(main())
