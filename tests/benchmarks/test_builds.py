"""Do the kernels build for real GPUs, in registers and with wide loads? Compiled ahead of time, no GPU needed."""

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
#: One target of each maker; ``python -m benchmarks.audit builds`` has all.
TARGETS = {"sm_90": (576, 4096, 16384), "gfx942": (576, 4096)}
NORM_FORWARD = {("hidden", "load"), ("normed", "store")}
NORM_BACKWARD = {("incoming", "load"), ("hidden", "load"), ("gradient", "store")}
#: What each call does with its [N, D] tensors.
ACCESSES = {
    "projection": {("hidden", "load")},
    "pass-through forward": {("hidden", "load")},
    "pass-through backward": {("incoming", "load"), ("gradient", "store")},
    "pass-through backward, no gradient arrives": {("gradient", "store")},
    "norm forward": NORM_FORWARD,
    "norm backward": NORM_BACKWARD,
    "norm backward, weight frozen": NORM_BACKWARD,
    "fused forward": NORM_FORWARD,
    "fused backward": NORM_BACKWARD,
    "fused backward, weight frozen": NORM_BACKWARD,
}


# One test per target, so that no two workers build the same.
@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_builds(target, tmp_path):
    pytest.importorskip("triton")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "triton")
    file = tmp_path / "records.json"
    command = [sys.executable, "-m", "benchmarks.audit", "builds", "--target", target, "--json", str(file)]
    command += [part for size in TARGETS[target] for part in ("--size", str(size))]
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    records = json.loads(file.read_text())

    plain = [r for r in records if (r["directions"], r["dtype"], r["penalty"]) == (1, "bfloat16", "squared")]
    assert {(r["call"], r["size"]) for r in plain} == {(call, size) for call in ACCESSES for size in TARGETS[target]}
    assert {1, 4, 8} <= {r["directions"] for r in records}
    assert {"bfloat16", "float16", "float32"} == {r["dtype"] for r in records}

    spilled = {(r["call"], r["size"], r["spilled_bytes"]) for r in records if r["spilled_bytes"]}
    assert spilled <= {("fused backward", 16384, 16)}  # rows of no usual model
    # Half of what a thread can have, and two more in one call: room for other compilers.
    assert [r for r in records if r["registers"] > 130] == []
    # What a block can have on the GPU that has the least (sm_86, sm_89, sm_120).
    assert [r for r in records if r["shared_bytes"] > 99 * 1024] == []

    # All traffic in hidden states and gradients moves 16 bytes per thread: 8 bfloat16 or 4 float32 numbers; but for the
    # last piece of a row that is no power of two.
    seen = defaultdict(set)
    for record in records:
        narrowest = {access["narrowest_bytes"] for access in record["accesses"]}
        assert narrowest <= ({2, 4, 8, 16} if record["size"] == 576 else {16}), record
        # A call of several launches shares its accesses among them.
        call = tuple(record[key] for key in ("call", "size", "directions", "dtype", "penalty"))
        # What arrives is what the launch that sums over rows calls rows.
        seen[call] |= {({"rows": "incoming"}.get(a["tensor"], a["tensor"]), a["way"]) for a in record["accesses"]}
    assert seen == {call: ACCESSES[call[0]] for call in seen}
