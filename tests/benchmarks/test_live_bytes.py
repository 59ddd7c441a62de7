"""What the constraint keeps alive: no reference model, no copies of hidden states."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCKS, TOKENS, WIDTH = 16, 512, 576


# One test, so that no two workers run the same steps.
@pytest.mark.slow
def test_peak_memory_of_a_step(tmp_path):
    file = tmp_path / "records.json"
    command = [sys.executable, "-m", "benchmarks.audit", "live-bytes", "--json", str(file)]
    counted = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert counted.returncode == 0, counted.stderr
    peaks = {(record["way"], record["dtype"]): record["peak_bytes"] for record in json.loads(file.read_text())}
    for dtype, itemsize in (("float32", 4), ("bfloat16", 2)):
        plain, unit = peaks["plain", dtype], TOKENS * WIDTH * itemsize
        assert plain > 16 * BLOCKS * unit  # the counter sees activations at all
        assert peaks["naive", dtype] - plain > BLOCKS * unit  # and what the constraint is there to avoid
        for way in ("pass-through", "fused"):
            assert peaks[way, dtype] <= 1.02 * plain, way
            # A few numbers per token and block, and one tile on CPU: far from one copy of a block's input per block.
            assert peaks[way, dtype] - plain <= BLOCKS * TOKENS * 16 + 2**20, way
