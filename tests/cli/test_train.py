"""``procon train`` on a tiny model: adapters, evaluation, resume, processes, and what cannot be trained."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from procon.cli import main
from procon.cli.parsing import COMMANDS
from procon.directions import Directions
from procon.models import load_model

TRAIN = [
    *("train", "model", "data.jsonl", "--directions", "directions.safetensors", "--drift_steps", "0"),
    *("--output_dir", "out", "--logging_steps", "1", "--dtype", "float32", "--use_cpu", "--procon_terms", "both"),
]


@pytest.fixture
def here(place, random_directions, tiny_model) -> Path:
    random_directions(tiny_model()).save("directions.safetensors")
    return place


def save_adapter(folder: str, model, **settings) -> None:
    """A new adapter of the model in ``model``."""
    get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], **settings)).save_pretrained(
        folder
    )
    file = Path(folder, "adapter_config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "model"}))


def logs(folder: str = "out") -> list[dict]:
    return json.loads(Path(folder, "trainer_state.json").read_text())["log_history"]


def test_train_then_resume(here, few_probes, capsys):
    argv = [*TRAIN, "--lora_targets", "q_proj, o_proj", "--flatten", "--procon_schedule", "0.5@1steps,0"]
    argv += ["--per_device_train_batch_size", "2", "--safety_samples", "3", "--own_replies", "4", "--save_steps", "2"]
    assert main([*argv, "--max_steps", "2"]) == 0
    said = capsys.readouterr().out
    assert "parameters train on 23 samples, under alpha" in said
    assert "1 of 2 steps were under the constraint, which acted on 2 of its 3 blocks; mean penalty" in said
    assert "Written: out.\nMeasure it: procon eval out; then: procon report out" in said
    assert sorted(json.loads(Path("out/adapter_config.json").read_text())["target_modules"]) == ["o_proj", "q_proj"]
    assert Path("out/tokenizer_config.json").is_file()
    mixed = "| mixed into the training data | 3 safety samples, 4 of the starting model's own replies |"
    assert mixed in Path("out/README.md").read_text()
    assert [row["procon/alpha"] for row in logs() if "loss" in row] == [0.5, 0]
    assert main([*argv, "--max_steps", "4"]) == 2
    assert "output_dir 'out' has checkpoints of a training: give --resume to go on" in capsys.readouterr().err
    assert main([*argv, "--max_steps", "4", "--resume", "--procon_schedule", "0"]) == 2
    assert "is of training under the constraint" in capsys.readouterr().err
    assert main([*argv, "--max_steps", "4", "--resume"]) == 0
    assert [row["step"] for row in logs() if "loss" in row] == [1, 2, 3, 4]
    assert Path("out/README.md").read_text().count("## Refusal anchored with ProCon") == 1
    assert Directions.load("out").hash == Directions.load("directions.safetensors").hash


def test_directions_are_extracted_where_none_are_given(here, capsys):
    argv = ["train", "model", "data.jsonl", "--output_dir", "out", "--max_steps", "1", "--dtype", "float32"]
    assert main([*argv, "--use_cpu", "--drift_steps", "1", "--procon_terms", "tokens"]) == 0
    assert "warning: the model refuses 0% of malicious prompts" in capsys.readouterr().err
    found = Directions.load("out")
    assert found.usable.tolist() == [False, True, True]
    start = Directions.extract(*load_model("model", dtype=torch.float32), check_refusal=False, progress=False)
    assert found.cosine(start)[1:].tolist() == pytest.approx([1, 1], abs=1e-4)  # of the model before training
    assert any("procon/drift_cos" in row for row in logs())


def test_without_the_constraint(here, capsys):
    assert main([*TRAIN, "--procon_schedule", "0", "--max_steps", "1", "--method", "full"]) == 0
    said = capsys.readouterr().out
    assert "47,520 of 47,520 parameters train on 16 samples, without the constraint." in said
    assert "Trained without the constraint." in said


@pytest.mark.parametrize("anchors", ["recorded", "live"])
def test_the_first_step_is_at_the_anchors(here, anchors):
    """Though dropout is on in training, and off when anchors are recorded: a fresh adapter adds nothing to drop."""
    flags = ["--lora_dropout", "0.5", "--max_steps", "2", "--learning_rate", "1e-2"]
    assert main([*TRAIN, *flags, "--procon_anchors", anchors]) == 0
    first, second = (row["procon/penalty"] for row in logs() if "loss" in row)
    assert first < 1e-7 < 1e-4 < second
    assert json.loads(Path("out/adapter_config.json").read_text())["lora_dropout"] == 0.5


def test_another_family_s_attention_is_found(here, tiny_model, random_directions):
    tiny_model("gpt_neox").save_pretrained("model")
    random_directions(tiny_model("gpt_neox")).save("directions.safetensors")
    assert main([*TRAIN, "--max_steps", "1"]) == 0
    assert "query_key_value" in json.loads(Path("out/adapter_config.json").read_text())["target_modules"]


def test_an_adapter_trained_further_trains_all_that_it_has(here):
    """Not its LoRA alone: what it keeps in full beside it, too."""
    save_adapter("with-head", load_model("model", dtype=torch.float32)[0], modules_to_save=["lm_head"])
    argv = ["train", "with-head", *TRAIN[2:]]
    assert main([*argv, "--max_steps", "1", "--attn_implementation", "eager"]) == 0
    before, after = (load_file(f"{folder}/adapter_model.safetensors") for folder in ("with-head", "out"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("lora_B" in name for name in changed)
    assert any("lm_head" in name for name in changed)


def test_evaluation_data_and_the_best_checkpoint(here):
    rows = [{"prompt": f"count to {n}", "completion": "x y z " * 3} for n in range(4)]
    Path("other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--eval_data", "other.jsonl", "--eval_steps", "1", "--save_steps", "1", "--load_best_model_at_end"]
    assert main([*TRAIN, *flags, "--max_steps", "4", "--learning_rate", "3e-2", "--lr_scheduler_type", "constant"]) == 0
    losses = {row["step"]: row["eval_loss"] for row in logs() if "eval_loss" in row}
    assert list(losses) == [1, 2, 3, 4]
    best = min(losses, key=losses.__getitem__)
    kept, of_best = (load_file(Path("out", name, "adapter_model.safetensors")) for name in ("", f"checkpoint-{best}"))
    assert all(torch.equal(kept[name], of_best[name]) for name in of_best)


@pytest.mark.parametrize("bits", [4, 8])
def test_qlora(here, bits):
    """The base is quantised, the penalty begins at nothing and acts, and what is written loads in bits."""
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="4-bit and 8-bit weights are bitsandbytes'")
    layer = {4: bitsandbytes.nn.Linear4bit, 8: bitsandbytes.nn.Linear8bitLt}[bits]
    flags = [f"--load_in_{bits}bit", "--max_steps", "4", "--learning_rate", "1e-2", "--save_strategy", "no"]
    assert main([*TRAIN, *flags, "--gradient_checkpointing"]) == 0
    penalties = [row["procon/penalty"] for row in logs() if "loss" in row]
    assert penalties[0] < 1e-6 < penalties[-1]
    model, _ = load_model("out", **{f"load_in_{bits}bit": True})
    assert any(isinstance(module, layer) for module in model.modules())


@pytest.mark.slow
def test_two_processes_train_as_one_does_with_twice_the_batch(here):
    """Started by torchrun, as by any other launcher."""
    flags = ["--max_steps", "3", "--learning_rate", "1e-2", "--method", "full", "--own_replies", "8"]
    assert main([*TRAIN, *flags, "--per_device_train_batch_size", "4"]) == 0
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    for name in ("LOCAL_RANK", "RANK"):
        environment.pop(name, None)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "procon.cli"]
    argv = [*TRAIN, *flags, "--output_dir", "two", "--per_device_train_batch_size", "2"]
    said = subprocess.run([*command, *argv], capture_output=True, text=True, env=environment, check=False)
    assert said.returncode == 0, said.stderr[-3000:]
    assert said.stdout.count("Written: two") == 1
    ours, theirs = ([row for row in logs(folder) if "loss" in row] for folder in ("two", "out"))
    for name in ("loss", "procon/penalty"):
        assert [row[name] for row in ours] == pytest.approx([row[name] for row in theirs], rel=1e-3, abs=1e-6)
    assert ours[-1]["procon/penalty"] > 1e-3


def test_an_interrupt_says_how_to_go_on(here, monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("procon.cli.train.load_model", interrupt)
    assert main(TRAIN) == 130
    assert "interrupted; procon train --resume goes on from its last checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--device_map", '{"model": "cpu", "lm_head": "disk"}'], "what lies in memory or on the disk does not train"),
        (["--model", "adapter", "--method", "full"], "'adapter' is a LoRA folder: merge it"),
        (["--lora_targets", "nothing"], "lora_targets 'nothing' do not fit the model"),
        (["--data_config", "main"], "data 'data.jsonl' is a file: leave out data_config"),
        (["--data_columns", "prompt"], "data_columns is 'prompt': give prompt=NAME"),
        (["--max_length", "5"], "none of the 16 samples has a response token"),
        (["--chat-template-kwargs", '{"thinks": 0}'], "chat_template_kwargs has 'thinks', which the chat template"),
        (["--report_to", "nope"], "nope is not supported, only"),
        (["--eval_strategy", "steps"], "you didn't pass an `eval_dataset`"),
        (["--num_train_epochs", "0"], "the training has no steps: give num_train_epochs or max_steps above 0"),
        (["--output_dir", "data.jsonl"], "cannot write 'data.jsonl/any'"),
        (["--procon_anchors_dir", "data.jsonl"], "cannot write 'data.jsonl/any'"),
        (["--procon_probes", "none.txt"], "prompt file 'none.txt' does not exist"),
        (["--resume"], "no complete checkpoint in 'out' to resume from"),
    ],
)
def test_what_cannot_train_is_one_line(here, tiny_model, flags, message, capsys):
    save_adapter("adapter", tiny_model())
    argv = ["train", "--data", *TRAIN[2:]] if "--model" in flags else TRAIN
    assert main([*argv, *flags]) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
    assert not list(Path().glob("out/*.safetensors"))


@pytest.mark.parametrize("flags", [["--report_to", "nope"], ["--resume"]])
def test_a_wrong_flag_is_answered_before_a_model_is_read(here, flags, monkeypatch):
    monkeypatch.setattr("procon.cli.train.load_model", None)
    assert main([*TRAIN, *flags]) == 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data.jsonl", "", "data.jsonl"),
        ("data.jsonl", '{"prompt": "a", ', "data.jsonl"),
        ("data.jsonl", '{"query": "a"}', "query"),
        ("directions.safetensors", b"\x08\0", "is damaged or not one of ProCon's"),
    ],
)
def test_files_that_cannot_be_read_are_one_line(here, name, content, message, capsys):
    Path(name).write_bytes(content.encode() if isinstance(content, str) else content)
    assert main(TRAIN) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("procon: error: ")
    assert message in line


@pytest.mark.parametrize("name", ["directions", "train", "drift", "eval"])
def test_each_command_that_loads_a_model_says_how(name, monkeypatch, tmp_path):
    """From flags and YAML."""
    asked = []

    def load(_, **given):
        asked.append(given)
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    for module in ("procon.cli.train", "procon.cli.commands"):
        monkeypatch.setattr(f"{module}.load_model", load)
    Path("data.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    Path("run.yaml").write_text("load_in_4bit: true\ndevice_map: {model: cpu, lm_head: disk}\ndtype: bfloat16\n")
    words = {"model": "m/m", "start": "m/m", "tuned": "m/m", "data": "data.jsonl"}
    flags = ["--attn_implementation", "eager", "--config", "run.yaml"]
    assert main([name, *(words[word] for word in COMMANDS[name].words), *flags]) == 130
    assert asked == [
        {
            "dtype": "bfloat16",
            "device_map": {"model": "cpu", "lm_head": "disk"},
            "load_in_4bit": True,
            "load_in_8bit": False,
            "attn_implementation": "eager",
            "trust_remote_code": False,
        }
    ]
