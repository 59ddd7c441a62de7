"""The axolotl plugin: real trainings by ``axolotl train``, the real plugin manager, and what is refused."""

import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file

from procon.directions import Directions
from procon.errors import ProConError
from procon.training import ProConArguments

# Before anything imports axolotl, which else reports to its makers, and has processes of its own for data, which import
# everything again.
os.environ |= {"AXOLOTL_DO_NOT_TRACK": "1", "AXOLOTL_DATASET_NUM_PROC": "0"}
pytest.importorskip("axolotl", reason="axolotl requires versions of its own: .ci/run oldest and newest install them")

from axolotl.cli.config import prepare_plugins
from axolotl.integrations.base import BasePlugin, PluginManager

from procon.integrations.axolotl import AxolotlKeys, ProConPlugin

PLUGIN = "procon.integrations.axolotl.ProConPlugin"
REENTRANT = {"use_reentrant": True}


@pytest.fixture
def axolotl_train(tiny_model, tokenizer, tmp_path):
    """``axolotl_train(**keys)``: the finished process of ``axolotl train``, eight chats and two to a batch."""
    tiny_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    chats = [
        {
            "messages": [
                {"role": "user", "content": f"count to {n}"},
                {"role": "assistant", "content": " ".join(map(str, range(n)))},
            ]
        }
        for n in range(3, 11)
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))

    def train(**keys) -> subprocess.CompletedProcess:
        settings = {
            "base_model": str(tmp_path / "model"),
            "datasets": [
                {
                    "path": str(tmp_path / "data.jsonl"),
                    "ds_type": "json",
                    "type": "chat_template",
                    "field_messages": "messages",
                }
            ],
            "chat_template": "tokenizer_default",
            "dataset_prepared_path": str(tmp_path / "prepared"),
            "dataset_num_proc": 0,
            "output_dir": str(tmp_path / "out"),
            "sequence_len": 128,
            "attn_implementation": "sdpa",
            "micro_batch_size": 2,
            "gradient_accumulation_steps": 1,
            "num_epochs": 1,
            "optimizer": "adamw_torch",
            "learning_rate": 1e-3,
            "bf16": False,
            "fp16": False,
            "tf32": False,
            "logging_steps": 1,
            "save_steps": 4,
            "dataloader_num_workers": 0,
            "dataloader_pin_memory": False,
            "val_set_size": 0,
            "plugins": [PLUGIN],
        }
        config = tmp_path / "config.yml"
        config.write_text(yaml.safe_dump(settings | keys))
        return subprocess.run(
            [Path(sys.executable).with_name("axolotl"), "train", config, "--launcher", "python"],
            cwd=tmp_path,
            env=os.environ | {"AXOLOTL_DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )

    return train


def logged(checkpoint: Path, name: str) -> list[float]:
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return [row[name] for row in history if name in row]


WARM_UP = {"procon_terms": "both", "procon_schedule": "procon_wu:1@1ep", "save_steps": 2}


@pytest.mark.slow
def test_warm_up_is_added_and_resumed(axolotl_train, tiny_model, tmp_path):
    result = axolotl_train(**WARM_UP)
    assert result.returncode == 0, result.stderr[-4000:]
    out = tmp_path / "out"
    # Four steps per epoch: one epoch of warm-up, and the one that was asked for.
    assert logged(out / "checkpoint-8", "procon/alpha") == [1, 1, 1, 1, 0, 0, 0, 0]
    first, *rest = logged(out / "checkpoint-8", "procon/penalty")
    assert first < 1e-9 < min(rest)
    # Directions were extracted from the model, and are kept beside what was trained.
    assert Directions.load(out / "refusal-directions.procon").basis.shape == (3, 1, 32)
    assert json.loads((out / "procon.json").read_text())["schedule"] == "procon_wu:1@1ep"
    assert "ProCon" in (out / "README.md").read_text()

    weights = load_file(out / "model.safetensors")
    # What is resumed does not start from the model that the file names.
    other = tiny_model()
    torch.nn.init.normal_(other.get_output_embeddings().weight)
    other.save_pretrained(tmp_path / "model")
    again = axolotl_train(**WARM_UP, resume_from_checkpoint="out/checkpoint-2")
    assert again.returncode == 0, again.stderr[-4000:]
    resumed = load_file(out / "model.safetensors")
    assert weights.keys() == resumed.keys()
    assert all((weights[name] == resumed[name]).all() for name in weights)


@pytest.mark.slow
def test_packed_samples_of_an_adapter(axolotl_train, tiny_model, tmp_path, random_directions):
    random_directions(tiny_model()).save(tmp_path / "directions.safetensors")
    result = axolotl_train(
        procon_directions=str(tmp_path / "directions.safetensors"),
        procon_terms="tokens",
        procon_schedule=0.5,
        # Of the padding, which axolotl numbers like one more sample, no token is constrained.
        procon_scope="all",
        procon_blocks=[1, 2],
        sample_packing=True,
        sequence_len=256,
        adapter="lora",
        lora_r=4,
        lora_alpha=8,
        lora_target_modules=["q_proj", "v_proj"],
        gradient_checkpointing=True,
        max_steps=4,
        num_epochs=4,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    out = tmp_path / "out"
    assert logged(out / "checkpoint-4", "procon/alpha") == [0.5] * 4
    first, *rest = logged(out / "checkpoint-4", "procon/penalty")
    assert first < 1e-9 < min(rest)
    assert json.loads((out / "procon.json").read_text())["blocks"] == [1, 2]
    PeftModel.from_pretrained(tiny_model(), out)


def register(**keys) -> dict:
    cfg = {"plugins": [PLUGIN], **keys}
    ProConPlugin().register(cfg)
    return cfg


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"procon_shcedule": 0.1}, "there is no key procon_shcedule: the keys are procon_terms, procon_schedule, "),
        ({"procon_scope": "answer"}, "procon_scope is 'answer': choose one of"),
        ({"rl": "dpo", "trainer_cls": "mine.Trainer"}, "rl, trainer_cls: under this the constraint could not act"),
        ({"pretraining_dataset": "data", "procon_terms": "tokens"}, "pretraining_dataset"),
        ({"context_parallel_size": 2}, "context_parallel_size"),
        # Before the model is loaded, which takes minutes.
        ({"procon_probes": "nowhere.txt"}, "prompt file 'nowhere.txt' does not exist"),
        (
            {"procon_terms": "tokens", "gradient_checkpointing": True, "gradient_checkpointing_kwargs": REENTRANT},
            "use_reentrant: true",
        ),
    ],
)
def test_refused(keys, message):
    with pytest.raises(ProConError, match=message):
        register(**keys)


def test_checkpointing_is_made_non_reentrant():
    assert "gradient_checkpointing_kwargs" not in register()
    assert register(gradient_checkpointing=True)["gradient_checkpointing_kwargs"] == {"use_reentrant": False}
    # Probes have a forward of their own, which keeps its gradients.
    keys = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": REENTRANT}
    assert register(**keys)["gradient_checkpointing_kwargs"] == REENTRANT


def test_alpha_zero_changes_nothing():
    keys = {"procon_schedule": 0, "gradient_checkpointing": True, "rl": "dpo"}
    cfg = register(**keys)
    assert cfg == {"plugins": [PLUGIN], **keys}
    assert ProConPlugin().get_trainer_cls(cfg) is None
    ProConPlugin().post_trainer_create(cfg, trainer=object())


def test_packing_without_separate_samples_is_refused():
    cfg = {"plugins": [PLUGIN], "sample_packing": True, "attn_implementation": None}
    with pytest.raises(ProConError, match="under attn_implementation None packed samples see each other"):
        ProConPlugin().pre_model_load(cfg | {"attn_decontaminates_packing": False})
    ProConPlugin().pre_model_load(cfg | {"attn_decontaminates_packing": True})


def test_settings_become_training_arguments():
    given = {
        "procon_terms": "tokens",
        "procon_schedule": 0.2,
        "procon_blocks": [8, 9],
        "procon_directions": "directions.safetensors",
    }
    assert ProConPlugin().get_training_args({"plugins": [PLUGIN], **given}) == {
        "procon_terms": "tokens",
        "procon_schedule": "0.2",
        "procon_blocks": "8,9",
        "procon_directions": "directions.safetensors",
    }
    own = {"procon_directions"}
    assert AxolotlKeys.model_fields.keys() == {field.name for field in fields(ProConArguments)} | own


class OtherTrainerPlugin(BasePlugin):
    """Brings a trainer of its own."""

    def get_trainer_cls(self, cfg):
        return dict


@pytest.fixture
def manager(monkeypatch) -> PluginManager:
    """axolotl's plugin manager, with no plugin registered."""
    manager = PluginManager.get_instance()
    monkeypatch.setattr(manager, "plugins", {})
    return manager


def test_plugin_manager_takes_our_trainer(manager):
    manager.register(PLUGIN)
    assert manager.get_trainer_cls({"plugins": [PLUGIN]}).__name__ == "ProConAxolotlTrainer"
    assert manager.get_input_args() == ["procon.integrations.axolotl.AxolotlKeys"]
    # A later training in the same process, that does not ask for it.
    assert manager.get_trainer_cls({"plugins": ["another.Plugin"]}) is None


def test_another_plugin_s_trainer_is_refused(manager):
    manager.plugins["other"] = OtherTrainerPlugin()
    manager.register(PLUGIN)
    cfg = {"plugins": ["other", PLUGIN]}
    trainer = manager.get_trainer_cls(cfg)()
    with pytest.raises(ProConError, match="axolotl made a dict, which has no constraint"):
        manager.post_trainer_create(cfg, trainer)


def test_a_plugin_that_cannot_be_imported_stops_axolotl(manager, monkeypatch):
    monkeypatch.delitem(sys.modules, "procon.integrations.axolotl")
    monkeypatch.setitem(sys.modules, "procon.training", None)
    with pytest.raises(ProConError, match=r"the axolotl plugin cannot be loaded: import of procon\.training halted"):
        prepare_plugins({"plugins": [PLUGIN]})
