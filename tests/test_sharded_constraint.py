"""Two gloo ranks give the gradient of one: FSDP2, checkpointed or not, and block inputs that are DTensors."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORKER = Path(__file__).parent / "workers" / "constraint.py"


@pytest.mark.slow
def test_two_ranks_give_the_gradient_of_one(tmp_path):
    result = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            str(WORKER),
            "found.pt",
        ],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    found = torch.load(tmp_path / "found.pt")

    def assert_same(case: tuple, expected: torch.Tensor) -> None:
        assert found[case]["fused"] == ((0, 1, 2) if case[1] == "auto" else ()), case
        # The fused norm computes in float64, transformers' own in float32 within a float64 model.
        assert (found[case]["gradient"] - expected).norm() <= 1e-6 * expected.norm(), case

    by_fully_shard = [case for case in found if case[0] in (1, 2)]
    assert len(by_fully_shard) == 8
    for case in by_fully_shard:
        assert_same(case, found[1, "never", False]["gradient"])

    plain = found["plain", "never"]
    assert plain["penalty"] > 0.1
    for fuse in ("auto", "never"):
        for placement in ("plain", "replicated", "rows", "tokens"):
            assert_same((placement, fuse), plain["gradient"])
            assert found[placement, fuse]["penalty"] == pytest.approx(plain["penalty"], rel=1e-9)
        for placement, name in (("width", "S(2)"), ("partial", "P(sum)")):
            refusal = found[placement, fuse]["refused"]
            assert refusal.startswith(
                f"block 0 got hidden states with placement {name}, of which no rank has whole rows"
            )
