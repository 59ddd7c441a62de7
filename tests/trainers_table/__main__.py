"""``python tests/trainers_table [--short]``: every trainer in every mode, under the constraint.

In each cell the penalty's gradient is the one by definition, or the set-up is refused; and with alpha 0 the training is
that of the class that is extended. With ``PROCON_RECORD_TABLE=1``, what is found is recorded too: in ``recorded.json``,
and in the page ``docs/compatibility.md`` that is made of it. Rows whose trainer is not installed keep their record.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import page

os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton

FOLDER = Path(__file__).parent
# What forks processes lies with what tests run in them.
sys.path.append(str(FOLDER.parent / "workers"))

TWO_RANKS = ("2 ranks DDP", "2 ranks FSDP2")

#: The cells of the short form: each row with anchors from everywhere, and what a source or a trainer is most likely to
#: get wrong. The one named first is also compared with the class that it extends; for the others,
#: tests/training/test_trainer.py and test_preferences.py do that.
COMPARED = ("DPO:live",)
SHORT = (
    *(f"{row}:{source}" for row in page.ROWS for source in page.SOURCES),
    "SFTTrainer:packed",
    "Trainer:padding-free",
    "SFTTrainer:non-reentrant",
    "Trainer:reentrant",
    "DPO:accumulation 4",
    "GRPO:accumulation 4",
    "SFTTrainer:QLoRA",
    "GRPO:LoRA",
    "Trainer:2 ranks FSDP2",
    "DPO:2 ranks DDP",
    "GRPO:2 ranks DDP",
    "bare loop:2 ranks DDP",
)


def run(cells: list[str], folder: Path, *options: str) -> dict:
    """What the cells give, by row and column; those of two ranks in processes of their own."""
    from forked import run_python, run_ranks

    found: dict = {}
    ranks = [cell for cell in cells if cell.split(":")[1] in TWO_RANKS]
    for number, some in enumerate((ranks, [cell for cell in cells if cell not in ranks])):
        if not some:
            continue
        file = folder / f"{number}-{len(some)}.json"
        command = [FOLDER / "cells.py", file, *some, "--folder", folder, *options]
        if some is ranks:
            run_ranks(2, *command, seconds=3600)
        else:
            run_python(*command, seconds=3600)
        for row, columns in json.loads(file.read_text()).items():
            found.setdefault(row, {}).update(columns)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python tests/trainers_table", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--short", action="store_true", help="the most telling cells: a minute")
    parser.add_argument("--rows", nargs="+", choices=page.ROWS, default=page.ROWS)
    parser.add_argument("--columns", nargs="+", choices=page.COLUMNS, default=page.COLUMNS)
    parser.add_argument(
        "--source",
        choices=page.SOURCES,
        help="where anchors come from in all columns (default: each row's own way); not recorded, and gradients alone",
    )
    parser.add_argument("--output", type=Path, help="a file to write what was found to")
    parser.add_argument("--page", action="store_true", help="nothing is run: the page is made of the record again")
    chosen = parser.parse_args()
    if chosen.page:
        page.PAGE.write_text(page.page(json.loads(page.RECORD.read_text())))
        return 0
    rows = [row for row in chosen.rows if row != "axolotl" or find_spec("axolotl")]
    cells = [f"{row}:{column}" for row in rows for column in chosen.columns]
    if chosen.short:
        cells = [cell for cell in SHORT if cell in cells]
    whole = not (chosen.short or chosen.source)
    options = [] if whole else ["--compared", *(COMPARED if chosen.short else [])]
    if chosen.source:
        options += ["--source", chosen.source]
    with tempfile.TemporaryDirectory() as folder:
        found = run(cells, Path(folder), *options)
    if chosen.output:
        chosen.output.write_text(json.dumps(found, indent=1))
    faults = [
        f"{row}, {column} {wrong}: {cell}"
        for row, columns in found.items()
        for column, cell in columns.items()
        if (wrong := page.fault(row, cell, compared=whole))
    ]
    for each in faults:
        print(each, file=sys.stderr)
    if os.environ.get("PROCON_RECORD_TABLE") and whole:
        page.record(found)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
