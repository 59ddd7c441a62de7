"""The kernels move the bytes that they must, and none besides: counted lane by lane in Triton's interpreter."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
#: Units of [N, D] traffic, loaded and stored, over the rows that have to move; rows of weight 0 are not read.
UNITS = {
    "projection": (1, 0),
    "pass-through forward": (1, 0),
    "pass-through backward": (1, 1),
    "pass-through backward, no gradient arrives": (0, 1),
}


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    pytest.importorskip("triton")
    file = tmp_path_factory.mktemp("traffic") / "records.json"
    command = [sys.executable, "-m", "benchmarks.audit", "traffic", "--json", str(file)]
    counted = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert counted.returncode == 0, counted.stderr
    return json.loads(file.read_text())


def test_every_kernel_is_counted(records):
    cases = {(r["call"], r["size"], r["directions"], r["dtype"]) for r in records}
    sizes, dtypes = (576, 1024, 3584, 4096), ("bfloat16", "float32")
    assert cases == {(call, d, k, dtype) for call in UNITS for d in sizes for k in (1, 4) for dtype in dtypes}


def test_hidden_states_move_once(records):
    for record in records:
        assert (record["units_loaded"], record["units_stored"]) == UNITS[record["call"]], record
