"""What the constraint keeps alive: no reference model, no copies of hidden states."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCKS, TOKENS, WIDTH = 16, 512, 576


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], dict]:
    """By way and dtype."""
    file = tmp_path_factory.mktemp("memory") / "records.json"
    command = [sys.executable, "-m", "benchmarks.audit", "live-bytes", "--json", str(file)]
    counted = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert counted.returncode == 0, counted.stderr
    return {(record["way"], record["dtype"]): record for record in json.loads(file.read_text())}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_memory_of_a_step(records, dtype):
    plain, naive = records["plain", dtype], records["naive", dtype]
    unit = TOKENS * WIDTH * {"float32": 4, "bfloat16": 2}[dtype]
    assert plain["peak_bytes"] > 16 * BLOCKS * unit  # the counter sees activations at all
    assert naive["peak_bytes"] - plain["peak_bytes"] > BLOCKS * unit  # and what the constraint is there to avoid
    constrained = records["pass-through", dtype]
    assert constrained["peak_bytes"] <= 1.02 * plain["peak_bytes"]
    # A few numbers a token and block, and one tile on CPU: far from one copy of a block input a block.
    assert constrained["peak_bytes"] - plain["peak_bytes"] <= BLOCKS * TOKENS * 16 + 2**20
