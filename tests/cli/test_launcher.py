"""``procon train --num_processes``: its own launcher starts processes, which train as one does."""

import json
import os
import re
from pathlib import Path

import pytest

from procon.cli import launcher, main
from procon.cli.arguments import TrainArguments
from procon.errors import ProConError

TRAIN = ["train", "model", "data.jsonl", "--directions", "directions.safetensors", "--drift_steps", "0"]


@pytest.fixture
def here(place, random_directions, tiny_model) -> Path:
    random_directions(tiny_model()).save("directions.safetensors")
    return place


def steps(folder: str) -> list[tuple[float, float]]:
    rows = json.loads(Path(folder, "trainer_state.json").read_text())["log_history"]
    return [(row["loss"], row["procon/penalty"]) for row in rows if "loss" in row]


@pytest.mark.slow
def test_two_processes_train_as_one_does_with_twice_the_batch(here, monkeypatch, capfd):
    for name in ("LOCAL_RANK", "RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    flags = ["--max_steps", "3", "--logging_steps", "1", "--learning_rate", "1e-2", "--method", "full", "--use_cpu"]
    assert main([*TRAIN, *flags, "--output_dir", "one", "--per_device_train_batch_size", "4"]) == 0
    capfd.readouterr()
    flags += ["--output_dir", "two", "--per_device_train_batch_size", "2", "--num-processes", "2"]
    assert main([*TRAIN, *flags]) == 0, capfd.readouterr().err[-3000:]
    said = capfd.readouterr().out
    assert re.search(r"model, float32, on cpu\S*, 2 processes", " ".join(said.split()))
    assert said.count("Written: two") == 1
    assert len(steps("two")) == 3
    for ours, theirs in zip(steps("two"), steps("one"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    assert steps("two")[-1][1] > 1e-3


def test_what_is_wrong_is_said_before_processes_are_started(here, monkeypatch, capsys):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(launcher, "launch", lambda *_, **__: pytest.fail("processes were started"))
    assert main([*TRAIN, "--num_processes", "2", "--learning_rate", "-1"]) == 2
    assert capsys.readouterr().err.splitlines() == ["procon: error: learning_rate is -1.0: give 0 or more"]


@pytest.mark.parametrize(
    ("flags", "devices", "message"),
    [
        (
            ["--accelerate_config", "fsdp3"],
            0,
            "accelerate_config is 'fsdp3': choose one of ddp, fsdp2, zero2, zero3,",
        ),
        (["--accelerate_config", "fsdp2"], 0, "accelerate_config is 'fsdp2', which keeps a model in parts over GPUs"),
        (["--accelerate_config", "own.yaml"], 0, "there is no GPU, so it is not known how many processes to start"),
        (["--accelerate_config", "data.jsonl"], 2, "accelerate_config 'data.jsonl' cannot be read"),
        (["--accelerate_config", "nested.yaml"], 2, "accelerate_config 'nested.yaml' cannot be read"),
        (["--accelerate_config", "two.yaml"], 2, "'two.yaml' gives num_processes 'two': give a whole number, 1 or"),
        (["--accelerate_config", "list.yaml"], 2, "'list.yaml' gives num_processes [2]: give a whole number, 1 or"),
        (["--accelerate_config", "inf.yaml"], 2, "'inf.yaml' gives num_processes inf: give a whole number, 1 or"),
        (["--num_processes", "4"], 2, "num_processes is 4, and this machine has 2 GPUs: give 2 or less"),
        (["--num_processes", "0"], 0, "num_processes is 0: give 1 or more"),
    ],
)
def test_what_cannot_be_started_is_refused(here, monkeypatch, capsys, flags, devices, message):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(launcher, "_devices", lambda: devices)
    Path("own.yaml").write_text("distributed_type: MULTI_GPU\n")
    Path("nested.yaml").write_text("[" * 3000)
    for name, number in {"two": "two", "list": "[2]", "inf": ".inf"}.items():
        Path(f"{name}.yaml").write_text(f"num_processes: {number}\n")
    assert main([*TRAIN, *flags]) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize("config", [None, "ddp", "fsdp2", "zero2", "zero3", "own.yaml"])
def test_what_accelerate_is_asked_for_on_gpus(here, monkeypatch, config):
    """There are none here: what its launcher makes of the configuration is all that can be looked at."""
    from accelerate.commands.launch import _validate_launch_command

    seen = []
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(launcher, "_devices", lambda: 2)
    monkeypatch.setattr(
        "accelerate.commands.launch.launch_command",
        lambda given: seen.append((_validate_launch_command(given)[0], dict(os.environ))),
    )
    Path("own.yaml").write_text("compute_environment: LOCAL_MACHINE\ndistributed_type: FSDP\nnum_processes: 2\n")
    flags = ["--num_processes", "2"] if config is None else ["--accelerate_config", config, "--num_processes=2"]
    assert main([*TRAIN, *flags]) == 0
    ((found, environment),) = seen
    assert (found.module, found.training_script) == (True, "procon.cli")
    assert found.training_script_args == [*TRAIN, *flags]
    assert found.num_processes == 2
    kinds = (found.multi_gpu, found.use_fsdp, found.use_deepspeed)
    assert kinds == (config in (None, "ddp"), config in ("fsdp2", "own.yaml"), config in ("zero2", "zero3"))
    if config == "fsdp2":
        assert found.fsdp_version == 2
    if config in ("zero2", "zero3"):
        assert found.zero_stage == int(config[-1])
    assert environment["PYTHONSAFEPATH"] == "1"
    assert "ACCELERATE_USE_CPU" not in environment


def test_a_process_starts_no_others(monkeypatch):
    """Whether it was started from here, or by torchrun or accelerate launch."""
    arguments = TrainArguments(model="m", data="d", num_processes=2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert launcher.asks_for_processes(arguments)
    assert not launcher.asks_for_processes(TrainArguments(model="m", data="d", num_processes=1))
    assert not launcher.asks_for_processes(TrainArguments(model="m", data="d", accelerate_config="ddp"))
    assert launcher.asks_for_processes(TrainArguments(model="m", data="d", accelerate_config="zero3"))
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert not launcher.asks_for_processes(arguments)
    with pytest.raises(ProConError, match="accelerate_config is 'zero4'"):
        launcher.asks_for_processes(TrainArguments(model="m", data="d", accelerate_config="zero4"))
