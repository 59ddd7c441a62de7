"""Every trainer in every mode: the penalty's gradient is the one by definition, or the set-up is refused.

``PROCON_RECORD_TABLE=1 pytest tests/project/test_trainers_table.py`` also records what it found, in
``trainers_table/recorded.json`` and in the page ``docs/compatibility.md`` that is made of it. Rows whose trainer is not
installed keep their last record.
"""

import json
import math
import os
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).parents[1] / "trainers_table"
RECORD = WORKER / "recorded.json"
PAGE = ROOT / "docs" / "compatibility.md"

ROWS = ("Trainer", "SFTTrainer", "bare loop", "Accelerate", "axolotl")
COLUMNS = {
    "1": (
        "padded",
        "packed",
        "padding-free",
        "accumulation 1",
        "accumulation 4",
        "checkpointing off",
        "non-reentrant",
        "reentrant",
        "LoRA",
        "full",
        "QLoRA",
        "1 rank",
        "compiled",
    ),
    "DDP": ("2 ranks DDP",),
    "FSDP2": ("2 ranks FSDP2",),
}
#: As in the issue that asked for the table: by what varies, the plain way first.
ORDER = (*COLUMNS["1"][:-1], "2 ranks DDP", "2 ranks FSDP2", "compiled")

#: Where alpha is 0, these are the classes that they extend.
EXTENDED = ("Trainer", "SFTTrainer")


@pytest.mark.slow
@pytest.mark.parametrize("ranks", COLUMNS)
def test_gradients_are_right_or_refused(ranks, tmp_path):
    pytest.importorskip("trl", reason="the SFTTrainer row")
    pytest.importorskip("bitsandbytes", reason="the QLoRA column")
    file = tmp_path / "cells.json"
    launch = [] if ranks == "1" else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    result = subprocess.run(
        [sys.executable, *launch, str(WORKER), str(file), "--ranks", ranks],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PROCON_TABLE_FOLDER": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    found = json.loads(file.read_text())
    assert list(found) == [row for row in ROWS if row != "axolotl" or find_spec("axolotl")]
    for row, cells in found.items():
        assert tuple(cells) == COLUMNS[ranks]
        for column, cell in cells.items():
            where = f"{row}, {column}: {cell}"
            # NaN compares as false.
            assert cell.get("error", 0) <= 1e-4, where
            assert ("error" in cell) != bool(cell.get("refused")), where
            assert (row in EXTENDED) == (cell.get("identical") is True), where
    if os.environ.get("PROCON_RECORD_TABLE"):
        record(found)
    recorded = json.loads(RECORD.read_text())
    for row, cells in found.items():
        for column, cell in cells.items():
            assert recorded[row]["cells"][column].get("refused") == cell.get("refused"), f"{row}, {column}: record anew"


def test_no_cell_is_blank():
    recorded = json.loads(RECORD.read_text())
    assert set(recorded) == set(ROWS)
    for row in ROWS:
        assert set(recorded[row]["cells"]) == set(ORDER)
        for cell in recorded[row]["cells"].values():
            assert cell.get("refused") or 0 < cell["error"] <= 1e-4


def test_page_is_the_record():
    assert PAGE.read_text() == page(json.loads(RECORD.read_text()))


def record(found: dict) -> None:
    recorded = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    for row, cells in found.items():
        packages = ["torch", "transformers", "accelerate", "peft"]
        packages += {"SFTTrainer": ["trl"], "axolotl": ["trl", "axolotl"]}.get(row, [])
        entry = recorded.setdefault(row, {"cells": {}})
        entry["versions"] = {package: version(package).split("+")[0] for package in packages}
        entry["cells"] |= cells
    RECORD.write_text(json.dumps({row: recorded[row] for row in ROWS if row in recorded}, indent=1) + "\n")
    PAGE.write_text(page(recorded))


def page(recorded: dict) -> str:
    reasons = []
    lines = ["| | " + " | ".join(ORDER) + " |", "|---" * (len(ORDER) + 1) + "|"]
    for row in ROWS:
        texts = []
        for column in ORDER:
            cell = recorded.get(row, {"cells": {}})["cells"].get(column, {})
            if "refused" in cell:
                if cell["refused"] not in reasons:
                    reasons.append(cell["refused"])
                texts.append(f"refused ({reasons.index(cell['refused']) + 1})")
            else:
                texts.append(f"{rounded_up(cell['error']):.0e}" if cell else "")
        lines.append(f"| **{row}** | " + " | ".join(texts) + " |")
    versions = [f"- {row}: {', '.join(map(' '.join, recorded[row]['versions'].items()))}" for row in recorded]
    refusals = [f"{number}. {reason}" for number, reason in enumerate(reasons, 1)]
    return "\n".join([*lines, "", "Refused with these words:", "", *refusals, "", "Run with:", "", *versions, ""])


def rounded_up(error: float) -> float:
    """To one digit, so that no cell claims more than was found."""
    unit = 10.0 ** math.floor(math.log10(error))
    return math.ceil(error / unit) * unit
