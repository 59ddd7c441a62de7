"""The kernels move the bytes that they must, and no others: counted lane by lane in Triton's interpreter."""

import json
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
#: Units of [N, D] traffic, loaded and stored, over the rows that have to move; rows of weight 0 are not read.
UNITS = {
    "projection": (1, 0),
    "pass-through forward": (1, 0),
    "pass-through backward": (1, 1),
    "pass-through backward, no gradient arrives": (0, 1),
    "norm forward": (1, 1),
    "norm backward": (2, 1),
    "norm backward, weight frozen": (2, 1),
    "fused forward": (1, 1),
    "fused backward": (2, 1),
    "fused backward, weight frozen": (2, 1),
}
#: Rows that fill no tile, that fill one, and that are read in pieces; the audit itself has more.
SIZES, LONG = (576, 4096), 16384
DTYPES = ("bfloat16", "float32")


# One test, so that no two workers count the same.
@pytest.mark.slow
def test_traffic(tmp_path):
    pytest.importorskip("triton")
    file = tmp_path / "records.json"
    command = [sys.executable, "-m", "benchmarks.audit", "traffic", "--json", str(file)]
    command += [part for size in (*SIZES, LONG) for part in ("--size", str(size))]
    counted = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert counted.returncode == 0, counted.stderr
    records = {
        tuple(record[key] for key in ("call", "size", "directions", "dtype")): record
        for record in json.loads(file.read_text())
    }
    expected = {(call, d, k, dtype) for call in UNITS for d in SIZES for k in (1, 4) for dtype in DTYPES}
    assert records.keys() == expected | {(call, LONG, 1, dtype) for call in UNITS for dtype in DTYPES}

    for (call, size, directions, dtype), record in records.items():
        if size != LONG:
            assert (record["units_loaded"], record["units_stored"]) == UNITS[call], record
        if call.startswith("fused"):
            # The constraint adds nothing to the norm here, at any length of row.
            plain = records[call.replace("fused", "norm"), size, directions, dtype]
            for key in ("units_loaded", "units_stored"):
                assert record[key] == plain[key], (record, plain)
            # Programs that keep many directions are larger, and fewer: they write fewer sums of rows.
            assert record["other_bytes"] <= plain["other_bytes"], (record, plain)

    def token_bytes(kind: str, backward: str, size: int, dtype: str) -> float:
        return sum(records[f"{kind} {way}", size, 1, dtype]["token_bytes_per_row"] for way in ("forward", backward))

    for case in product(("backward", "backward, weight frozen"), SIZES, DTYPES):
        assert 0 < token_bytes("fused", *case) - token_bytes("norm", *case) <= 24, case
