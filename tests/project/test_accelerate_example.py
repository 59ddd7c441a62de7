"""The Accelerate example does on two ranks, with each of its configurations, what it does on one."""

import json
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from forked import run_ranks
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "accelerate"
#: And what Accelerate makes of each on two CPU ranks.
CONFIGURATIONS = {
    "ddp.yaml": "MULTI_CPU",
    "fsdp2.yaml": "FSDP",
    "deepspeed_zero2.yaml": "DEEPSPEED",
    "deepspeed_zero3.yaml": "DEEPSPEED",
}


@pytest.fixture
def place(place, tiny_model, random_directions) -> Path:
    """And directions in it."""
    random_directions(tiny_model()).save("directions.safetensors")
    return place


def steps(printed: str) -> list[dict[str, float]]:
    """The numbers of the lines about a step."""
    lines = [line.split() for line in printed.splitlines() if line.startswith("step ")]
    return [{line[i]: float(line[i + 1]) for i in range(2, len(line), 2)} for line in lines]


def test_every_configuration_is_run():
    assert sorted(CONFIGURATIONS) == sorted(path.name for path in EXAMPLE.glob("*.yaml"))


@pytest.mark.slow
def test_two_ranks_do_what_one_does(place, monkeypatch, capsys):
    def on_one(terms: str) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
        flags = ["--model=model", "--data=data.jsonl", "--directions=directions.safetensors", f"--output_dir={terms}"]
        flags += ["--batch_size=4", "--epochs=2", "--schedule=0@1steps,100@2steps,0", "--learning_rate=1e-3"]
        monkeypatch.setattr(sys, "argv", ["train.py", *flags, f"--terms={terms}"])
        runpy.run_path(str(EXAMPLE / "train.py"), run_name="__main__")
        AcceleratorState._reset_state(reset_partial_state=True)
        expected = steps(capsys.readouterr().out)
        # The first step is free: at the anchors, the absolute penalty has the slope of a rounding error.
        assert [step["alpha"] for step in expected] == [0, 100, 100, 0]
        assert expected[0]["penalty"] == 0
        assert expected[1]["penalty"] > 1e-6
        assert expected[2]["penalty"] > 1e-6
        return expected, load_file(f"{terms}/model.safetensors")

    alone = {terms: on_one(terms) for terms in ("both", "tokens")}
    configurations = [name for name in CONFIGURATIONS if find_spec("deepspeed") or not name.startswith("deepspeed")]
    run_ranks(2, ROOT / "tests" / "workers" / "examples.py", place, *configurations)
    for name, run in json.loads((place / "printed.json").read_text()).items():
        assert run["kind"] == CONFIGURATIONS[name]
        found = steps(run["printed"])
        expected, tuned = alone["tokens" if "zero3" in name else "both"]  # it takes one forward for each backward
        assert len(found) == 4
        for ours, theirs in zip(found, expected, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-12), name
        weights = load_file(place / name / "model.safetensors")
        assert weights.keys() == tuned.keys()
        for key, value in weights.items():
            # Adam divides small gradients' rounding errors by their size.
            torch.testing.assert_close(value, tuned[key], rtol=0, atol=1e-5)
    if "deepspeed_zero3.yaml" not in configurations:
        pytest.skip("all but ZeRO is as it should be: DeepSpeed is not installed")
