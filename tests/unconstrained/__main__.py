"""``python tests/unconstrained [--short] [--output FILE] [WORD...]``: ways to train that might lose the constraint.

Each ends as "acts" (the weights differ from those of the same training without it), "refused" (by an error), "warned",
"said" (asked for, and the record says so), "harmless" (nothing could move) or, when a run goes on, "same" (bitwise
what it would have been). What ends as SILENT makes the exit code 1. With words: only scenarios that have them all in
their names.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from unittest import mock

os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["HF_HUB_OFFLINE"] = "1"

import folders  # noqa: F401  # by importing, scenarios are listed
import loops  # noqa: F401
import resuming  # noqa: F401
import schedules  # noqa: F401
import setups  # noqa: F401
import torch
import trainers  # noqa: F401
import transformers
from accelerate.state import AcceleratorState
from setting import SCENARIOS, Outcome, Scenario, clean


def run(scenario: Scenario, root: Path) -> Outcome:
    """How the scenario ended; an error that is not ours is one more way."""
    AcceleratorState._reset_state(reset_partial_state=True)
    with mock.patch.dict(os.environ):  # in which TrainingArguments leave settings for what comes after
        try:
            return scenario.run(clean(root / "run"))
        except Exception as error:
            return Outcome("error", f"{type(error).__name__}: {error}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--output", type=Path)
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("procon").propagate = False
    transformers.PrinterCallback.on_log = lambda *_, **__: None
    torch.set_num_threads(1)
    picked = [
        scenario
        for scenario in SCENARIOS
        if (scenario.short or not chosen.short)
        and all(word in f"{scenario.door} {scenario.name}" for word in chosen.words)
    ]
    rows = []
    with tempfile.TemporaryDirectory() as root:
        for number, scenario in enumerate(picked, start=1):
            began = time.monotonic()
            found = run(scenario, Path(root))
            detail = found.detail.replace(root, "").replace("\n", " ")
            rows.append({"door": scenario.door, "scenario": scenario.name, "outcome": found.outcome, "detail": detail})
            told = f"{time.monotonic() - began:.1f}s {scenario.door}: {scenario.name}: {found.outcome}: {detail[:150]}"
            print(f"{number}/{len(picked)} {told}", file=sys.stderr, flush=True)
    counts = Counter(row["outcome"] for row in rows)
    print(json.dumps(counts))
    if chosen.output:
        made = {
            "date": time.strftime("%Y-%m-%d"),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "machine": f"{platform.machine()}, CPU",
        }
        command = "python tests/unconstrained" + (" --short" if chosen.short else "")
        chosen.output.write_text(json.dumps({"command": command, "made": made, "rows": rows}, indent=1) + "\n")
    return 1 if counts["SILENT"] or counts["error"] else 0


sys.exit(main())
