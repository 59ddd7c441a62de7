"""What is saved beside a model: directions, settings, a section of the card; and nothing in the model itself."""

import json
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, ModelCard, RepoUrl, metadata_load
from huggingface_hub.utils import filter_repo_objects
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from procon.directions import DIRECTIONS_FILE, Directions, randomized
from procon.errors import ProConError
from procon.method.probes import PROBES_FILE
from procon.method.record import read_record
from procon.training import model_card
from procon.training.callbacks import ProbeCallback
from procon.training.model_card import describe, write_section
from procon.version import __version__

HEADING = "## Refusal anchored with ProCon"
OURS = {DIRECTIONS_FILE, PROBES_FILE, "procon.json"}

LORA = LoraConfig(r=2, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM")

#: Every trainer, with an adapter and without.
KINDS = pytest.mark.parametrize(
    ("base", "lora"), [("Trainer", LORA), ("Trainer", None), ("SFTTrainer", LORA), ("SFTTrainer", None)]
)


class ConstantDrift(ProbeCallback):
    """What DriftCallback logs, at no cost."""

    def measure(self) -> dict[str, float]:
        return {"procon/drift_cos": 0.98765}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@KINDS
def test_saved_model_tells_how_it_was_constrained(make_trainer, tmp_path, base, lora):
    trainer = make_trainer(
        base, "procon_wu:0.5@1ep", lora=lora, procon_scope="all", procon_units="gap", procon_blocks="1,2"
    )
    trainer.add_callback(ConstantDrift(trainer, trainer.processing_class, steps=4))
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
        assert (folder / "README.md").read_text().count(HEADING) == 1
        assert "procon" in metadata_load(folder / "README.md")["tags"]
        assert Directions.load(folder).hash == trainer.procon.directions.hash
        anchors = [path.name for path in (output / "_anchors").iterdir()]
        record = json.loads((folder / "procon.json").read_text())
        assert read_record(folder) == {name: value for name, value in record.items() if name != "checksum"}
        assert len(record.pop("checksum")) == 16
        run, arguments = record.pop("run"), record.pop("arguments")
        assert (run["seed"], run["samples_per_step"], arguments["learning_rate"]) == (42, 2, 1e-2)
        files = record.pop("files", {})
        assert set(files) == (
            {str(path.relative_to(folder)) for path in folder.rglob("*")} - {"procon.json"} if files else set()
        )
        did = record.pop("did")
        assert did.pop("mean_penalty") == pytest.approx(sum(penalties.values()) / 2)
        assert did.pop("penalty_sum") == pytest.approx(sum(penalties.values()))
        assert did == {"steps": 2 if files else 6, "constrained_steps": 2, "blocks_acted": [1, 2]}
        assert record.pop("resumable", True)
        assert record.pop("window") == {"penalty": 0.0, "steps": 0}
        assert record == {
            "version": __version__,
            "constrained": True,
            "chat": {"system_prompt": None, "template_kwargs": {}},
            "schedule": "procon_wu:0.5@1ep",
            "scope": "all",
            "penalty": "squared",
            "units": "gap",
            "blocks": [1, 2],
            "directions": trainer.procon.directions.hash,
            "concepts": ["refusal"],
            "anchors": "recorded",
            "probes": "builtin",
            "probe_batch": 8,
            "probe_every": 2,
            "probe_weight": 15.0,
            "probe_reply_tokens": 0,
            "terms": {"tokens": {"anchors": anchors[0], "starting_model": None}, "probes": {}},
            "steps_per_epoch": trainer.procon.steps_per_epoch,
        }
    for part in (
        "| strength (alpha) | 0.5 for 1 extra epoch, then 0 to the end (`procon_wu:0.5@1ep`) |",
        "| optimiser steps under the constraint | 2 of 6 |",
        "| blocks that it acted on | 1 to 2 of 3, from 0 |",
        f"| mean penalty, before alpha | {sum(penalties.values()) / 2:.3g} |",
        "| constrained tokens | all |",
        "| constrained blocks | 1 to 2 of 3, from 0 |",
        "| penalty | squared, gap units |",
        "the last hidden state at the last token of probe prompts (builtin), at most 8 every 2 steps, with weight 15 |",
        "`): of tiny, from 3 malicious and 4 benign prompts; it then refused 96% of malicious ones |",
        f"| last logged penalty, before alpha | {penalties[2]:.3g} at step 2 |",
        "| mean cosine of re-extracted directions to the first | 0.988 at step 6 |",
        "Not measured in this run: refusal of malicious prompts",
        "@article{du2025",
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
            said, ours = "## Trained without ProCon's constraint", written["ours"][name].read_text()
            before, _, after = ours.partition("<!-- procon -->")
            assert said in after
            assert before.rstrip() + after.partition("<!-- /procon -->")[2].rstrip() == path.read_text().rstrip()


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
def test_push_to_hub_hands_over_all_files(make_trainer, hub, base, lora):
    trainer = make_trainer(
        base, "procon_s", lora=lora, hub_model_id="someone/tiny", hub_revision="branch", save_strategy="no"
    )
    trainer.train()
    trainer.push_to_hub(commit_message="tuned")
    (upload,) = hub
    assert (upload["repo_id"], upload["revision"], upload["commit_message"]) == ("someone/tiny", "branch", "tuned")
    weights = "adapter_model.safetensors" if lora else "model.safetensors"
    assert upload["files"].keys() >= OURS | {"README.md", weights, "tokenizer.json"}
    assert not [name for name in upload["files"] if name.startswith("_anchors")]
    card = ModelCard(upload["files"]["README.md"].decode())
    assert card.text.count(HEADING) == 1
    # What the trainer that is extended says of the model is still there, above ours.
    title = "# Model Card for tiny" if base == "SFTTrainer" else "# tiny"
    assert card.text.index(title) < card.text.index(HEADING)
    assert len(card.data.tags) == len(set(card.data.tags))
    assert "procon" in card.data.tags
    # PEFT has the last word on the Trainer's card, and TRL on its own.
    assert card.data.library_name == ("peft" if base == "Trainer" and lora else "transformers")
    assert ("trl" in card.data.tags) == (base == "SFTTrainer")


@pytest.mark.parametrize("base", ["Trainer", "SFTTrainer"])
def test_pushed_checkpoints_have_the_files_too(make_trainer, hub, base):
    trainer = make_trainer(
        base, "procon_s", lora=LORA, hub_model_id="someone/tiny", push_to_hub=True, hub_strategy="checkpoint"
    )
    trainer.train()
    roots = [upload for upload in hub if "path_in_repo" not in upload]
    checkpoints = [upload for upload in hub if "path_in_repo" in upload]
    assert roots
    assert checkpoints
    for upload in hub:
        assert upload["files"].keys() >= OURS | {"README.md", "adapter_model.safetensors"}
        assert upload["files"]["README.md"].decode().count(HEADING) == 1


def test_section_is_replaced_where_it_stands(tmp_path):
    card = tmp_path / "README.md"
    metadata = "---\nlicense: apache-2.0\ntags: mine\nmodel-index:\n- name: x\n  results: []\n---\n"
    card.write_text(f"{metadata}# Mine\n\nAbout \\1 it.\n")
    write_section(card, f"{HEADING}\n\nfirst \\1")
    card.write_text(card.read_text() + "\n### Framework versions\n")  # as PEFT appends
    write_section(card, f"{HEADING}\n\nsecond \\g<0>")
    assert metadata_load(card) == {
        "license": "apache-2.0",
        "tags": ["mine", "procon"],
        "model-index": [{"name": "x", "results": []}],
    }
    body = card.read_text().split("---\n", 2)[2]
    assert body == (
        f"# Mine\n\nAbout \\1 it.\n\n<!-- procon -->\n{HEADING}\n\nsecond \\g<0>\n<!-- /procon -->\n"
        "\n### Framework versions\n"
    )


def test_card_of_other_settings():
    settings = {
        "version": "1",
        "schedule": "1@2ep,0.1@200steps,0",
        "scope": "response",
        "penalty": "huber",
        "units": "raw",
        "blocks": [0, 2],
        "directions": "abc",
        "terms": {"tokens": {"anchors": "def", "starting_model": None}},
        "did": {"steps": 300, "constrained_steps": 204, "blocks_acted": [2], "mean_penalty": None},
    }
    random = randomized(Directions(torch.eye(3, 8)[:, None], torch.ones(3, 1)), seed=7)
    measured = [
        {"procon/refusal_malicious": 0.5, "procon/refusal_benign": 0.25, "procon/task": 0.125, "step": 3},
        {"procon/refusal_malicious": 0.75, "step": 9},
    ]
    text = describe(settings, random, measured)
    for part in (
        "| 1 for 2 epochs, then 0.1 for 200 steps, then 0 to the end (`1@2ep,0.1@200steps,0`) |",
        "| 0, 2 of 3, from 0 |",
        "random ones (seed 7): a control",
        "| penalty | huber, raw units |",
        "| last logged penalty, before alpha | not logged |",
        "| refusal of malicious prompts (keywords) | 75% at step 9 |",
        "| refusal of benign prompts (keywords) | 25% at step 3 |",
        "Not measured in this run: mean cosine of re-extracted directions to the first.\nA model",
    ):
        assert part in text
    assert "| mean penalty, before alpha | not finite |" in text
    none = describe({**settings, "did": {"steps": 3, "constrained_steps": 0}}, random, [])
    assert "without the projection constraint: none of its 3 steps was under it" in none
    assert HEADING not in none
    assert "| 0.1 throughout (`0.1`) |" in describe({**settings, "schedule": "0.1"}, random, [])


def test_a_card_names_concepts_and_the_last_output(tiny_model):
    model = tiny_model()
    probe = Directions.from_vectors(model, {1: torch.ones(32), "last": torch.ones(32)}, name="honesty")
    refusal = torch.eye(4, 32)[:, None] * torch.tensor([1, 1, 1, 0])[:, None, None]
    both = Directions.combine(Directions(refusal, refusal.any(-1).float(), last_output=True), probe)
    settings = {
        "version": "1",
        "schedule": "0.1",
        "scope": "all",
        "penalty": "absolute",
        "units": "raw",
        "blocks": [0, 2, 3],
        "directions": "abc",
        "terms": {"tokens": {"anchors": "def", "starting_model": None}},
        "did": {"steps": 3, "constrained_steps": 3, "blocks_acted": [3], "mean_penalty": 0.5},
    }
    text = describe(settings, both, [])
    for part in (
        "of each block's input along directions of refusal, honesty, on training tokens.\n",
        "| constrained blocks | 0, 2 of 3, from 0; the last block's output |",
        "| blocks that it acted on | the last block's output |",
        "| directions | `refusal-directions.safetensors` (`abc`), 2 per block |",
        "| blocks of refusal | 0 to 2 of 3, from 0 |",
        "| blocks of honesty | 1 of 3, from 0; the last block's output |",
        "from procon import Directions\n",
    ):
        assert part in text


@pytest.mark.parametrize("base", ["Trainer", "SFTTrainer"])
def test_merged_model_has_no_trace(make_trainer, tmp_path, base):
    merged, hooks = {}, {}
    for folder, schedule in (("plain", None), ("ours", "procon_s")):
        trainer = make_trainer(base, schedule, lora=LORA, folder=folder, save_strategy="no")
        trainer.train()
        tuned = trainer.accelerator.unwrap_model(trainer.model).eval()
        ids = torch.arange(5, 25)[None]
        with torch.no_grad():
            expected = tuned(ids).logits
        plain = tuned.merge_and_unload()
        plain.save_pretrained(tmp_path / folder / "merged")
        hooks[folder] = [
            (name, len(module._forward_hooks), len(module._forward_pre_hooks), "forward" in vars(module))
            for name, module in plain.named_modules()
        ]
        reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / folder / "merged").eval()
        with torch.no_grad():
            # One rounding of each merged weight, of order 1e-7 beside it.
            torch.testing.assert_close(reloaded(ids).logits, expected, rtol=1e-4, atol=1e-5)
        merged[folder] = tmp_path / folder / "merged"
    assert hooks["plain"] == hooks["ours"]
    assert names(merged["plain"]) == names(merged["ours"])
    ours, plain = (load_file(merged[folder] / "model.safetensors") for folder in ("ours", "plain"))
    assert {name: tensor.shape for name, tensor in ours.items()} == {name: t.shape for name, t in plain.items()}
    assert any(not torch.equal(ours[name], plain[name]) for name in ours)  # the constraint did act
    for name in ("config.json", "generation_config.json"):
        assert (merged["ours"] / name).read_text() == (merged["plain"] / name).read_text()


@pytest.mark.parametrize(
    "provenance",
    [
        {"counts": {}},
        {"counts": None},
        {"counts": {"positive": "x", "negative": 1}},
        {"counts": {"positive": 1, "negative": 2}, "model": 5, "refusal_rate": "high"},
        {"counts": {"positive": 1, "negative": 2}, "model": ["<script>"], "refusal_rate": [1]},
        {"random_seed": {}},
    ],
    ids=str,
)
def test_any_provenance_can_be_described(random_directions, tiny_model, provenance):
    """Whoever made a directions file may have written anything into it."""
    directions = replace(random_directions(tiny_model()), provenance=provenance)
    assert "<" not in model_card._origin(directions)
