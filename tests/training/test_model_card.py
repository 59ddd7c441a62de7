"""What is saved beside a model: directions, settings, a section of the card; and nothing in the model itself."""

import json
import re
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, ModelCard, ModelCardData, RepoUrl, metadata_load
from huggingface_hub.utils import filter_repo_objects
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from procon.directions import DIRECTIONS_FILE, Directions
from procon.errors import ProConError
from procon.evaluation import Evaluation
from procon.evaluation.rates import Rate
from procon.method.probes import PROBES_FILE
from procon.method.record import read_record
from procon.training.model_card import describe, write_evaluation, write_section
from procon.version import __version__

HEADING = "## Refusal anchored with ProCon"
OURS = {DIRECTIONS_FILE, PROBES_FILE, "procon.json"}

LORA = LoraConfig(r=2, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM")

#: Every trainer, with an adapter and without.
KINDS = pytest.mark.parametrize(
    ("base", "lora"), [("Trainer", LORA), ("Trainer", None), ("SFTTrainer", LORA), ("SFTTrainer", None)]
)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@KINDS
def test_saved_model_tells_how_it_was_constrained(make_trainer, tmp_path, base, lora):
    trainer = make_trainer(base, "procon_wu:0.5@1ep", lora=lora, procon_scope="all", procon_blocks="1,2")
    trainer.train()
    trainer.save_model()
    penalties = {row["step"]: row["procon/penalty"] for row in trainer.state.log_history if "procon/penalty" in row}
    assert list(penalties) == [1, 2]
    output = tmp_path / "out"
    card = (output / "README.md").read_text()
    trainer.save_model()
    assert (output / "README.md").read_text() == card

    for folder in (output, output / "checkpoint-2"):
        assert names(folder) >= OURS
        # vLLM takes all of these for weights.
        weights = "adapter_model.safetensors" if lora else "model.safetensors"
        assert [path.name for path in folder.glob("*.safetensors")] == [weights]
        assert (folder / "README.md").read_text().count(HEADING) == 1
        assert "procon" in metadata_load(folder / "README.md")["tags"]
        assert Directions.load(folder).hash == trainer.procon.directions.hash
        anchors = [path.name for path in (output / "_anchors").iterdir()]
        record = json.loads((folder / "procon.json").read_text())
        assert read_record(folder) == {name: value for name, value in record.items() if name != "checksum"}
        files = record.get("files", {})
        assert set(files) == (
            {str(path.relative_to(folder)) for path in folder.rglob("*")} - {"procon.json"} if files else set()
        )
        assert record["did"] == {
            "steps": 2 if files else 6,
            "constrained_steps": 2,
            "blocks_acted": [1, 2],
            "mean_penalty": pytest.approx(sum(penalties.values()) / 2),
            "penalty_sum": pytest.approx(sum(penalties.values())),
        }
        assert record["window"] == {"penalty": 0.0, "steps": 0}
        assert (record["version"], record["directions"]) == (__version__, trainer.procon.directions.hash)
        assert [record[name] for name in ("constrained", "schedule", "scope", "penalty", "blocks")] == [
            *(True, "procon_wu:0.5@1ep", "all", "squared", [1, 2])
        ]
        fused = {"fusion": "all fused into the blocks' norms"}
        assert record["states"]["tokens"] == {"anchors": anchors[0], "starting_model": None, **fused}
        assert "| the op | all fused into the blocks' norms |" in card
    assert not re.findall('[\\["]None[\\]"]', card)  # as TRL has it for what is in a folder
    for part in (
        "| optimiser steps under the constraint | 2 of 6 |",
        f"| mean penalty, before alpha | {sum(penalties.values()) / 2:.3g} |",
        f"| anchors | recorded (`{anchors[0]}`) |",
        "own replies to probe prompts (builtin), at most 4 every 2 steps, with weight 15 |",
    ):
        assert part in card
    assert str(tmp_path) not in card[card.index(HEADING) :]


@KINDS
def test_schedule_of_zero_writes_what_the_trainer_writes_and_says_so(make_trainer, tmp_path, base, lora):
    written = {}
    for folder, schedule in (("plain", None), ("ours", "0")):
        trainer = make_trainer(base, schedule, lora=lora, folder=folder)
        trainer.train()
        trainer.save_model()
        trainer.create_model_card(model_name="tiny")
        root = tmp_path / folder
        written[folder] = {path.relative_to(root): path for path in root.rglob("*")}
    records = [name for name in written["ours"] if name.name == "procon.json"]
    assert {name.parent.name for name in records} == {"", "checkpoint-2", "checkpoint-4"}
    assert written["plain"].keys() == written["ours"].keys() - set(records)
    for name in records:
        record = json.loads(written["ours"][name].read_text())
        assert (record["constrained"], record["schedule"]) == (False, "0")
    for name, path in written["plain"].items():
        if path.name == "README.md":
            assert written["ours"][name].read_text() == path.read_text()


def test_constrained_run_does_not_go_on_from_an_unconstrained_one(make_trainer):
    make_trainer("Trainer", "0").train()
    with pytest.raises(ProConError, match="is of training without the constraint: resume with schedule '0'"):
        make_trainer("Trainer", "procon_s").train(resume_from_checkpoint=True)


@pytest.fixture
def hub(monkeypatch) -> list[dict]:
    """What would have been uploaded, call by call, with the files' contents at that moment; nothing is sent."""
    uploads = []

    def create_repo(self, repo_id, **kwargs):
        return RepoUrl(f"https://huggingface.co/{repo_id}")

    def upload_folder(self, *, folder_path, ignore_patterns=None, **kwargs):
        root = Path(folder_path)
        files = [str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()]
        kept = filter_repo_objects(files, ignore_patterns=ignore_patterns)
        uploads.append({**kwargs, "files": {name: (root / name).read_bytes() for name in kept}})
        done = Future()
        done.set_result(None)
        return done

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    return uploads


@KINDS
@pytest.mark.parametrize("strategy", [None, "checkpoint"])
def test_everything_is_pushed(make_trainer, hub, base, lora, strategy):
    settings = {"push_to_hub": True, "hub_strategy": strategy} if strategy else {"save_strategy": "no"}
    trainer = make_trainer(
        base, "procon_s", lora=lora, hub_model_id="someone/tiny", hub_revision="branch", max_steps=2, **settings
    )
    trainer.train()
    if not strategy:
        trainer.push_to_hub(commit_message="tuned")
        assert [(push["repo_id"], push["revision"], push["commit_message"]) for push in hub] == [
            ("someone/tiny", "branch", "tuned")
        ]
    # Checkpoints, and the model.
    assert {"path_in_repo" in push for push in hub} == ({True, False} if strategy else {False})
    weights = "adapter_model.safetensors" if lora else "model.safetensors"
    for push in hub:
        assert push["files"].keys() >= OURS | {"README.md", weights, "tokenizer.json"}
        assert not [name for name in push["files"] if name.startswith("_anchors")]
        card = ModelCard(push["files"]["README.md"].decode())
        assert card.text.count(HEADING) == card.data.tags.count("procon") == 1
        # What the trainer that is extended says of the model is still there, above ours.
        title = "# Model Card for tiny" if base == "SFTTrainer" else "# tiny"
        assert strategy or card.text.index(title) < card.text.index(HEADING)


RECORD = {
    "constrained": True,
    "version": "1",
    "schedule": "1@2ep,0.1@200steps,0",
    "scope": "response",
    "penalty": "squared",
    "anchors": "live",
    "directions": "abc",
    "states": {"tokens": {"anchors": None, "starting_model": "def", "fusion": "none fused"}},
    "did": {"steps": 300, "constrained_steps": 204, "blocks_acted": [2, 3], "mean_penalty": None},
}


def test_section_is_replaced_where_it_stands(tmp_path):
    card = tmp_path / "README.md"
    metadata = "---\nlicense: apache-2.0\ntags: mine\nmodel-index:\n- name: x\n  results: []\n---\n"
    card.write_text(f"{metadata}# Mine\n\nAbout \\1 it.\n")
    write_section(card, RECORD, None)
    card.write_text(card.read_text() + "\n### Framework versions\n")  # as PEFT appends
    write_section(card, {**RECORD, "schedule": "\\g<0>"}, None)
    assert metadata_load(card) == {
        "license": "apache-2.0",
        "tags": ["mine", "procon"],
        "model-index": [{"name": "x", "results": []}],
    }
    body = card.read_text().split("---\n", 2)[2]
    before, section, after = re.split("<!-- /?procon -->", body)
    assert (before, after) == ("# Mine\n\nAbout \\1 it.\n\n", "\n\n### Framework versions\n")
    assert "| strength (alpha) | `\\g<0>` |" in section
    write_section(card, {**RECORD, "constrained": False}, None)
    assert "ProCon" not in card.read_text()


def test_a_template_with_nothing_in_it_gives_way_and_what_was_measured_stays_last(tmp_path):
    card = tmp_path / "tuned" / "README.md"
    card.parent.mkdir()
    template = ModelCard.from_template(ModelCardData(library_name="peft")).content
    filled = template.replace("[More Information Needed]", "Mine.", 1)
    card.write_text(filled)
    write_section(card, RECORD, None)
    assert "Mine." in card.read_text()  # nothing of it is lost
    assert card.read_text().count("[More Information Needed]") == 38
    card.write_text(f"{template}\n### Framework versions\n\n- PEFT 1\n")
    write_section(card, RECORD, None)
    text = card.read_text()
    assert metadata_load(card) == {"library_name": "peft", "tags": ["procon"]}
    assert "# tuned\n" in text
    assert "### Framework versions\n\n- PEFT 1\n" in text
    assert "[More Information Needed]" not in text
    for hits in (60, 61):
        rates = Rate(hits, 64), Rate(3, 64), Rate(0, 1)
        write_evaluation(card, Evaluation("tuned", *rates, Rate(1.5, 2), []))
    text = card.read_text()
    assert text.count("Measured afterwards:") == text.count("<!-- /procon -->") == 1
    assert "| malicious prompts refused, by keywords | 61 of 64 |" in text
    assert "| task | 1.5 of 2 |" in text
    write_section(card, RECORD, None)  # of another training
    assert "Measured afterwards:" not in card.read_text()
    write_evaluation(tmp_path / "other.md", Evaluation("tuned", *rates, None, []))
    assert not (tmp_path / "other.md").exists()


def test_a_card_names_concepts_and_what_was_kept(tiny_model):
    model = tiny_model()
    probe = Directions.from_vectors(model, {1: torch.ones(32), 2: torch.ones(32)}, name="honesty")
    text = describe({**RECORD, "best": {"step": 9, "metric": "eval_loss", "value": 0.5}}, probe)
    for part in (
        "| each block's input along directions of honesty, at response tokens; squared penalty |",
        "| blocks that it acted on | 2, 3 of 3, from 0 |",
        "| anchors | live (`def`) |",
        "| mean penalty, before alpha | not finite |",
        "| kept | the checkpoint of step 9, with the best eval_loss, 0.5 |",
    ):
        assert part in text


def test_merged_model_has_no_trace(make_trainer, tmp_path):
    trainer = make_trainer("Trainer", "procon_s", lora=LORA, save_strategy="no")
    plain = make_trainer("Trainer", None, folder="plain")
    hooks = [(name, len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in plain.model.named_modules()]
    trainer.train()
    tuned = trainer.accelerator.unwrap_model(trainer.model).eval()
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        expected = tuned(ids).logits
    merged = tuned.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    plain.model.save_pretrained(tmp_path / "start")
    assert [(name, len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in merged.named_modules()] == hooks
    assert not any("forward" in vars(module) for module in merged.modules())
    with torch.no_grad():
        reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()(ids).logits
    # One rounding of each merged weight, of order 1e-7 beside it.
    torch.testing.assert_close(reloaded, expected, rtol=1e-4, atol=1e-5)
    assert names(tmp_path / "merged") == names(tmp_path / "start")
    ours, start = (load_file(tmp_path / folder / "model.safetensors") for folder in ("merged", "start"))
    assert {name: tensor.shape for name, tensor in ours.items()} == {name: t.shape for name, t in start.items()}
    assert (tmp_path / "merged" / "config.json").read_text() == (tmp_path / "start" / "config.json").read_text()
