"""Do the kernels build for real GPUs, in registers and with wide loads? Compiled ahead of time, no GPU needed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SIZES = {576, 1024, 2048, 3584, 4096, 5120, 8192, 16384}
#: What each call does with its [N, D] tensors.
ACCESSES = {
    "projection": {("hidden", "load")},
    "pass-through forward": {("hidden", "load")},
    "pass-through backward": {("incoming", "load"), ("gradient", "store")},
    "pass-through backward, no gradient arrives": {("gradient", "store")},
}


@pytest.fixture(scope="module", params=["sm_80", "sm_90", "sm_100", "gfx942"])
def records(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    pytest.importorskip("triton")
    folder = tmp_path_factory.mktemp("builds")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder / "triton")
    command = [sys.executable, "-m", "benchmarks.audit", "builds", "--target", request.param]
    command += ["--json", str(folder / "records.json")]
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return json.loads((folder / "records.json").read_text())


def test_every_kernel_builds_at_every_size(records):
    plain = [r for r in records if (r["directions"], r["dtype"], r["penalty"]) == (1, "bfloat16", "squared")]
    assert {(r["call"], r["size"]) for r in plain} == {(call, size) for call in ACCESSES for size in SIZES}
    assert {4, 8} <= {r["directions"] for r in records}
    assert {"float16", "float32"} <= {r["dtype"] for r in records}


def test_nothing_spills(records):
    assert [r for r in records if r["spilled_bytes"]] == []


def test_registers_leave_room_for_two_blocks_of_16_warps(records):
    assert [r for r in records if r["registers"] > 128] == []


def test_loads_and_stores_are_wide(records):
    """All traffic in hidden states and gradients moves 16 bytes a thread: 8 bfloat16 or 4 float32 numbers."""
    for record in records:
        assert {(a["tensor"], a["way"]) for a in record["accesses"]} == ACCESSES[record["call"]], record
        assert {a["narrowest_bytes"] for a in record["accesses"]} == {16}, record
