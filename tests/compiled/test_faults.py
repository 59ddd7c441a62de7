"""Does a fault of a kernel fail the test that launches it? Planted ones do, in a run of their own."""

import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(importlib.util.find_spec("ttsem") is None, reason="it plays the GPU, and is not installed"),
]

PLANTED = """
import pytest
import torch
import triton
import triton.language as tl

pytestmark = pytest.mark.gpu


@triton.jit
def double(source, result, N, TILE: tl.constexpr, FAULT: tl.constexpr):
    place = tl.program_id(0) * TILE + tl.arange(0, TILE)
    if FAULT == "interleaved":  # which is none
        place = tl.program_id(0) + tl.arange(0, TILE) * tl.num_programs(0)
    inside = place < N
    if FAULT == "no mask at the load":
        value = tl.load(source + place)
    elif FAULT == "undefined":
        value = tl.load(source + place, mask=place < N - 1)
    else:
        value = tl.load(source + place, mask=inside, other=0)
    if FAULT == "no mask at the store":
        tl.store(result + place, 2 * value)
    elif FAULT == "race":
        tl.store(result + place % 8, 2 * value, mask=inside)
    elif FAULT == "two lanes":
        tl.store(result + place // 2, 2 * value, mask=inside)
    elif FAULT == "never written":
        tl.store(result + place, 2 * value, mask=inside & (place > 0))
    else:
        tl.store(result + place, 2 * value, mask=inside)


def run(fault, size=19):
    source = torch.arange(1.0, size + 1, device="cuda")
    result = torch.empty(size, device="cuda")
    double[(triton.cdiv(size, 8),)](source, result, size, TILE=8, FAULT=fault)
    return source, result


FAULTS = "none, no mask at the load, no mask at the store, undefined, race, two lanes, never written, interleaved"


@pytest.mark.parametrize("fault", FAULTS.split(", "))
def test_values(fault):
    source, result = run(fault)
    assert torch.equal(result, 2 * source)


def test_caught():
    try:
        run("no mask at the store")
    except Exception:
        pass


def test_too_large(monkeypatch):
    monkeypatch.setattr("ttsem.memory.ACCESS_BUDGET", 20)
    run("interleaved")
"""

#: What each planted test says; the kernel's own line is in most.
EXPECTED = {
    "test_values[no mask at the load]": "reads 5 element(s) past the end of the tensor passed as `source`",
    "test_values[no mask at the store]": "writes 5 element(s) past the end of the tensor passed as `result`",
    "test_values[undefined]": "assert False",
    "test_values[race]": "both touch element 0 of `result`",
    "test_values[two lanes]": "two lanes of one store",
    "test_values[never written]": "assert False",
    "test_caught": "writes 5 element(s) past the end of the tensor passed as `result`",
    "test_too_large": "too large for ttsem to look for races",
}


def test_what_is_not_run_is_there_and_has_a_reason():
    listed = tomllib.loads(Path(__file__).with_name("not_run.toml").read_text())
    for test, reason in listed.items():
        path, name = test.split("::")
        assert f"@pytest.mark.gpu\ndef {name}(" in re.sub(r"@pytest.mark.param.+\n", "", (ROOT / path).read_text())
        assert reason


def test_planted_faults_are_found(tmp_path):
    (tmp_path / "test_planted.py").write_text(PLANTED)
    command = [sys.executable, str(Path(__file__).parent), "-p", "no:xdist", "-rA", "--tb=short", "test_planted.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"{len(EXPECTED)} failed, 2 passed" in done.stdout
    for test, message in EXPECTED.items():
        report = done.stdout.split(f" {test} ")[1].split("\n____")[0]
        assert message in " ".join(report.split()), report
