"""The flags about loading: in every command that loads a model, refused at the door, and handed on."""

import json
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn

from procon.cli import main
from procon.cli.help import groups_of
from procon.cli.loading import LOADING
from procon.cli.registry import COMMANDS
from procon.models import load_model

#: A command that loads a model, and what it needs beside its settings.
LOADS = {
    "directions": ["directions", "model"],
    "train": ["train", "model", "data.jsonl", "--drift_steps", "0", "--max_steps", "1"],
    "drift": ["drift", "model", "model"],
    "eval": ["eval", "model"],
}

each_command = pytest.mark.parametrize("command", LOADS)


@each_command
def test_every_command_that_loads_a_model_has_them(command):
    (group,) = [group for group in groups_of(COMMANDS[command]) if group.title == LOADING]
    assert [setting.name for setting in group.settings] == [
        *("dtype", "device_map", "load_in_4bit", "load_in_8bit", "attn_implementation", "trust_remote_code")
    ]


@each_command
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--load_in_4bit", "--load_in_8bit"], "load_in_4bit and load_in_8bit are both set: choose one"),
        (["--device_map", "gpu"], "device_map is 'gpu': give auto, balanced, balanced_low_0, sequential, a device"),
        (["--device_map", '{"model": "tape"}'], """device_map is '{"model": "tape"}': give auto"""),
        (["--device_map", "{}"], "device_map is '{}': give auto"),
        (["--device_map", "{"], "device_map is '{': give auto"),
        (["--attn_implementation", "flash"], "attn_implementation is 'flash': choose one of auto, eager, sdpa"),
        (["--attn_implementation", "evil/kernel"], "attn_implementation is 'evil/kernel', which is code from a hub"),
        (["--dtype", "int8"], "dtype is 'int8': choose one of"),
    ],
)
def test_wrong_values_are_refused_before_a_model_is_read(place, command, flags, message, monkeypatch, capsys):
    for loader in ("AutoModelForCausalLM", "AutoTokenizer"):
        monkeypatch.setattr(f"procon.models.loading.{loader}.from_pretrained", lambda *_, **__: pytest.fail("read"))
    assert main([*LOADS[command], *flags]) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.fixture
def loaded(monkeypatch) -> list[dict]:
    """What ``load_model`` is asked for, in place of a model."""
    asked = []

    def load(name, **given):
        asked.append(given)
        raise KeyboardInterrupt

    for module in ("procon.cli.train", "procon.cli.commands"):
        monkeypatch.setattr(f"{module}.load_model", load)
    return asked


@each_command
def test_they_reach_the_model_from_flags_and_yaml(place, command, loaded):
    Path("run.yaml").write_text("load_in_4bit: true\ndevice_map: {model: cpu, lm_head: disk}\ndtype: bfloat16\n")
    flags = ["--attn_implementation", "eager", "--config", "run.yaml"]
    assert main([*LOADS[command], *flags]) == 130
    assert loaded == [
        {
            "dtype": "bfloat16",
            "device_map": {"model": "cpu", "lm_head": "disk"},
            "load_in_4bit": True,
            "load_in_8bit": False,
            "attn_implementation": "eager",
            "trust_remote_code": False,
        }
    ]


def test_training_on_the_cpu_loads_to_the_cpu(place, loaded):
    assert main([*LOADS["train"], "--use_cpu"]) == 130
    assert loaded[0]["device_map"] == "cpu"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--method", "full", "--load_in_8bit"], "load_in_8bit is set, and quantised weights do not train"),
        (["--method", "full", "--use_dora"], "use_dora is of an adapter, and method is 'full': leave it out"),
        (["--merge", "--load_in_4bit"], "merge and load_in_4bit are both set, and an adapter merged into rounded"),
        (["--load_in_4bit", "--accelerate_config", "fsdp2"], "'fsdp2' would take quantised weights apart: take ddp"),
        (["--lora_dropout", "1"], "lora_dropout is 1: give a share, 0 or more and less than 1"),
        (["--lora_targets", "nothing"], "lora_targets 'nothing' do not fit the model"),
        (
            ["--model", "adapter", "--lora_r", "4"],
            "lora_r is of a new adapter, and model 'adapter' is one: leave it out",
        ),
        (["--device_map", '{"model": "cpu", "lm_head": "disk"}'], "what lies in memory or on the disk does not train"),
    ],
)
def test_what_cannot_train_is_refused(place, tiny_model, flags, message, capsys):
    get_peft_model(tiny_model(), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])).save_pretrained(
        "adapter"
    )
    file = Path("adapter/adapter_config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "model"}))
    argv = [word for word in LOADS["train"] if word != "model"] if "--model" in flags else LOADS["train"]
    argv = ["train", "--data", *argv[1:]] if "--model" in flags else argv
    assert main([*argv, *flags]) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
    assert not Path("procon-output").exists()


@pytest.mark.parametrize("bits", [4, 8])
def test_qlora_by_the_command_line(place, random_directions, tiny_model, bits, capsys):
    """The base is quantised, the penalty begins at nothing and acts, and what is written loads in bits."""
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="4-bit and 8-bit weights are bitsandbytes'")
    random_directions(tiny_model()).save("directions.safetensors")
    layer = {4: bitsandbytes.nn.Linear4bit, 8: bitsandbytes.nn.Linear8bitLt}[bits]
    flags = [f"--load_in_{bits}bit", "--directions", "directions.safetensors", "--output_dir", "tuned"]
    flags += ["--max_steps", "4", "--learning_rate", "1e-2", "--logging_steps", "1", "--eval_share", "0.25"]
    flags += ["--eval_strategy", "steps", "--eval_steps", "2", "--save_strategy", "no", "--gradient_checkpointing"]
    assert main([*LOADS["train"], *flags]) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert f"model, {bits} bits and float32, on cpu" in " ".join(said.split())
    rows = json.loads(Path("tuned/trainer_state.json").read_text())["log_history"]
    penalties = [row["procon/penalty"] for row in rows if "procon/penalty" in row]
    assert penalties[0] < 1e-6 < penalties[-1]
    assert [row["step"] for row in rows if "eval_loss" in row] == [2, 4]
    record = json.loads(Path("tuned/procon.json").read_text())
    assert record["did"]["constrained_steps"] == 4
    assert any(
        weight.any() for name, weight in load_file("tuned/adapter_model.safetensors").items() if "lora_B" in name
    )
    model, _ = load_model("tuned", **{f"load_in_{bits}bit": True})
    assert any(isinstance(module, layer) for module in model.modules())
    assert isinstance(model.get_submodule("base_model.model.lm_head"), nn.Linear)
