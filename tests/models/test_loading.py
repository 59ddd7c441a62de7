"""Loading a model runs no code that comes with it, and asks nobody whether it may."""

import io
import json
import sys
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model

from procon.errors import ProConError
from procon.models import load_model

#: What a model's own code would do: leave a trace.
CODE = "from pathlib import Path\nPath('ran').touch()\nfrom transformers import LlamaConfig, LlamaForCausalLM\n"
CODE += "class Config(LlamaConfig):\n    model_type = 'mine'\n"
CODE += "class Model(LlamaForCausalLM):\n    config_class = Config\n"


@pytest.fixture
def folder(tiny_model, tokenizer, tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    tiny_model().save_pretrained("model")
    tokenizer.save_pretrained("model")
    # Whoever asks gets a yes.
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 10))
    return tmp_path / "model"


def edit(folder: Path, name: str, **values) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def with_code(folder: Path) -> None:
    (folder / "code.py").write_text(CODE)
    edit(
        folder,
        "config.json",
        model_type="mine",
        auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"},
    )


def with_tokenizer_code(folder: Path) -> None:
    (folder / "code.py").write_text(CODE)
    edit(folder, "tokenizer_config.json", tokenizer_class="Mine", auto_map={"AutoTokenizer": ["code.Mine", None]})


@pytest.mark.parametrize("prepare", [with_code, with_tokenizer_code])
@pytest.mark.parametrize("adapter", [False, True])
def test_code_of_a_model_is_refused(folder, tiny_model, prepare, adapter):
    if adapter:
        get_peft_model(tiny_model(), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])).save_pretrained(
            "lora"
        )
        edit(Path("lora"), "adapter_config.json", base_model_name_or_path="model")
    prepare(folder)
    name = "lora" if adapter else "model"
    with pytest.raises(
        ProConError, match=rf"model '{name}' comes with code of its own.*trust_remote_code=True"
    ) as caught:
        load_model(name)
    assert "--trust_remote_code" in str(caught.value)
    assert not Path("ran").exists()
    assert sys.stdin.tell() == 0


def test_code_that_is_trusted_runs(folder, monkeypatch, tmp_path):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    with_code(folder)
    model, _ = load_model("model", trust_remote_code=True)
    assert type(model).__name__ == "Model"
    assert Path("ran").exists()


@pytest.mark.parametrize(
    "at", ["attn_implementation", "_attn_implementation_internal", "experts_implementation", "text_config"]
)
def test_kernels_from_a_hub_are_refused(folder, at):
    value = {"attn_implementation": "evil/kernel"} if at == "text_config" else "evil/kernel"
    edit(folder, "config.json", **{at: value})
    with pytest.raises(ProConError, match="'evil/kernel', which is code from a hub, which is not run"):
        load_model("model")


def test_names_of_models_move_no_cursor(folder):
    edit(folder, "config.json", model_type="\x1b[2Jmine")
    with pytest.raises(ProConError, match="cannot be loaded") as caught:
        load_model("model")
    assert str(caught.value).isprintable()
