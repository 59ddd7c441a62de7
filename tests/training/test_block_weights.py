"""Causal block weights in a training: found in the starting model, kept, and the same when it goes on."""

import json
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments

from procon.data import padding_collator
from procon.errors import ProConError
from procon.evaluation import block_effects, causal_weights
from procon.integrations import ProConCallback
from procon.training import block_weights


@pytest.fixture
def start(tiny_model):
    """A model whose replies to malicious and to benign prompts open differently."""

    def make():
        model = tiny_model(tie_word_embeddings=False)
        with torch.no_grad():
            model.get_output_embeddings().weight *= 40
        return model

    return make


@pytest.fixture
def never_again(monkeypatch):
    """Once called, nothing is found in a model any more."""

    def refuse(*args, **kwargs):
        raise AssertionError("the model was asked, which by now is another one")

    return lambda: monkeypatch.setattr(block_weights, "block_effects", refuse)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[units], other[units]) for units in one)


def losses(trainer) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize("units", ["raw", "gap"])
def test_a_training_has_them_of_its_start_and_keeps_them(make_trainer, start, tokenizer, tmp_path, never_again, units):
    settings = {"procon_block_weights": "causal", "procon_blocks": "1,2", "procon_units": units}

    def trainer(folder: str, **more) -> Trainer:
        return make_trainer("Trainer", "procon_s:2", model=start(), folder=folder, **{**settings, **more})

    whole = trainer("whole")
    whole.train()
    directions = whole._directions
    by_units = causal_weights(block_effects(start(), tokenizer, directions), directions, [1, 2])
    assert same(whole.constraint.weights, by_units)
    expected = by_units[units]
    assert expected.mean() == pytest.approx(1)
    assert expected[0] != pytest.approx(1, abs=0.01)

    checkpoint = tmp_path / "whole" / "checkpoint-2"
    record = json.loads((checkpoint / "procon.json").read_text())
    assert record["block_weights"] == "causal"
    assert record["weights"] == {name: each.tolist() for name, each in by_units.items()}

    never_again()
    resumed = trainer("whole")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert same(resumed.constraint.weights, by_units)
    assert losses(resumed) == losses(whole)
    resumed.save_model()
    each = ", ".join(f"{weight:.3g}" for weight in expected.tolist())
    assert f"| weights of the blocks | causal, in the order of the blocks: {each} |" in (
        tmp_path / "whole" / "README.md"
    ).read_text(encoding="utf-8")

    with pytest.raises(ProConError, match="trained with block_weights 'causal', not 'equal'"):
        trainer("whole", procon_block_weights="equal").train(resume_from_checkpoint=str(checkpoint))


def test_they_change_the_training_and_of_one_block_they_do_not(make_trainer, start):
    found = {}
    for blocks in ("1,2", "2"):
        for kind in ("causal", "equal"):
            trainer = make_trainer(
                "Trainer",
                "procon_s:2",
                model=start(),
                folder=f"{blocks}-{kind}",
                procon_blocks=blocks,
                procon_block_weights=kind,
                save_strategy="no",
            )
            trainer.train()
            found[blocks, kind] = losses(trainer)
    assert found["2", "causal"] == found["2", "equal"]
    assert found["1,2", "causal"] != found["1,2", "equal"]


def test_several_directions_per_block(make_trainer, start, tokenizer):
    trainer = make_trainer("Trainer", "procon_s", model=start(), procon_block_weights="causal", save_strategy="no")
    first = trainer._directions
    further = torch.nn.functional.normalize(torch.arange(32.0) - 15.5, dim=0).expand(3, 1, 32).contiguous()
    given = replace(first, further=further)
    trainer._make_constraint(given)
    trainer.train()
    effects = block_effects(start(), tokenizer, given)
    assert effects.shape == (3, 2)
    assert same(trainer.constraint.weights, causal_weights(effects, given, range(3)))


def test_without_a_chat_template(make_trainer, start, tokenizer):
    trainer = make_trainer("Trainer", "procon_s", model=start(), procon_block_weights="causal")
    tokenizer.chat_template = None
    with pytest.raises(ProConError, match="block_weights is 'causal', and there is no tokenizer with a chat template"):
        trainer.train()


def test_of_a_model_that_does_not_refuse(make_trainer, tiny_model):
    model = tiny_model()
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    with pytest.raises(ProConError, match="the model does not refuse"):
        make_trainer("Trainer", "procon_s", model=model, procon_block_weights="causal").train()


def test_of_a_sharded_model(make_trainer, start, monkeypatch):
    monkeypatch.setattr("procon.evaluation.causal_effects.is_sharded", lambda model: True)
    with pytest.raises(ProConError, match=r"this one is sharded: load it whole, or set block_weights to 'equal'"):
        make_trainer("Trainer", "procon_s", model=start(), procon_block_weights="causal").train()


def test_the_callback_has_them_too(start, tokenizer, random_directions, samples, tmp_path, never_again):
    def train(tokenizer=tokenizer, max_steps: int = 4, kind: str = "causal", **resuming) -> ProConCallback:
        model = start()
        callback = ProConCallback(random_directions(model), block_weights=kind)
        Trainer(
            model,
            TrainingArguments(
                str(tmp_path), max_steps=max_steps, save_steps=2, bf16=False, report_to=[], disable_tqdm=True
            ),
            train_dataset=Dataset.from_list(samples),
            data_collator=padding_collator(tokenizer) if tokenizer else padding,
            processing_class=tokenizer,
            callbacks=[callback],
        ).train(**resuming)
        return callback

    padding = padding_collator(tokenizer)
    with pytest.raises(ProConError, match="pass one as processing_class, or set block_weights to 'equal'"):
        train(tokenizer=None)
    model = start()
    directions = random_directions(model)
    expected = causal_weights(block_effects(model, tokenizer, directions), directions, range(3))
    assert same(train()._constraint.weights, expected)
    record = json.loads((tmp_path / "checkpoint-2" / "procon.json").read_text())
    assert record["weights"]["raw"] == expected["raw"].tolist()
    never_again()
    resume = {"resume_from_checkpoint": str(tmp_path / "checkpoint-2")}
    assert same(train(**resume)._constraint.weights, expected)
    with pytest.raises(ProConError, match="block_weights 'causal', not 'equal'"):
        train(kind="equal", **resume)


@pytest.mark.parametrize("anchors", ["probes", "live+probes"])
def test_with_other_sources_of_anchors(make_trainer, start, tokenizer, anchors):
    """Weights and sides are those of the probes, too."""
    found = {}
    for kind, sides in (("causal", "fall"), ("causal", "both"), ("equal", "both")):
        trainer = make_trainer(
            "Trainer",
            "procon_s:2",
            model=start(),
            folder=f"{kind}-{sides}",
            procon_block_weights=kind,
            procon_sides=sides,
            procon_anchors=anchors,
            procon_probe_hold="projections",
            procon_probe_every=1,
            save_strategy="no",
        )
        trainer.train()
        found[kind, sides] = losses(trainer)
    assert len({tuple(each) for each in found.values()}) == 3
