"""Evaluation while training: the plain trainer's, on samples that have no anchors."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from procon.errors import ProConError

EVALUATING = {"eval_strategy": "steps", "eval_steps": 2}


def accuracy(prediction) -> dict[str, float]:
    guessed, labels = prediction.predictions.argmax(-1)[:, :-1], prediction.label_ids[:, 1:]
    live = labels != -100
    return {"accuracy": float((guessed == labels)[live].mean()), "tokens": int(live.sum())}


def penalties(trainer) -> list[float]:
    return [row["procon/penalty"] for row in trainer.state.log_history if "procon/penalty" in row]


@pytest.mark.parametrize(
    ("base", "settings"),
    [
        ("Trainer", {}),
        ("Trainer", {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}),
        ("SFTTrainer", {}),
        ("SFTTrainer", {"packing": True, "max_length": 64, "eval_packing": True}),
        ("SFTTrainer", {"packing": True, "max_length": 64, "eval_packing": False}),
        ("SFTTrainer", {"padding_free": True, "max_length": None}),
    ],
)
def test_eval_loss_is_the_plain_trainers(make_trainer, tmp_path, base, settings):
    trainer = make_trainer(base, "procon_s:1", **EVALUATING, **settings)
    trainer.train()
    logged = {row["step"]: row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row}
    assert list(logged) == [2, 4]
    assert len(penalties(trainer)) == 4
    assert penalties(trainer)[-1] > 0
    for step, loss in logged.items():
        weights = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / f"checkpoint-{step}")
        plain = make_trainer(base, None, model=weights, **settings)
        assert plain.evaluate()["eval_loss"] == loss  # the same arithmetic, to the bit


# TRL 1.9 hands compute_metrics a tuple, with and without the constraint.
@pytest.mark.parametrize("base", ["Trainer", pytest.param("SFTTrainer", marks=pytest.mark.newest)])
def test_metrics_and_predictions_are_the_plain_trainers(make_trainer, tmp_path, base):
    trainer = make_trainer(base, "procon_s:1", **EVALUATING, compute_metrics=accuracy)
    trainer.train()
    weights = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "checkpoint-4")
    plain = make_trainer(base, None, model=weights, compute_metrics=accuracy)

    logged = [row for row in trainer.state.log_history if "eval_accuracy" in row][-1]
    found = plain.evaluate()
    assert (logged["eval_accuracy"], logged["eval_tokens"]) == (found["eval_accuracy"], found["eval_tokens"])
    ours, theirs = (t.predict(t.eval_dataset) for t in (trainer, plain))
    assert np.array_equal(ours.predictions, theirs.predictions)
    assert ours.metrics["test_loss"] == theirs.metrics["test_loss"]

    batch = next(iter(trainer.get_eval_dataloader()))
    assert not batch.keys() & {"anchors", "constraint_mask"}
    for prediction_loss_only in (True, False):
        ours, theirs = (
            t.prediction_step(t.model, dict(batch), prediction_loss_only=prediction_loss_only) for t in (trainer, plain)
        )
        assert torch.equal(ours[0], theirs[0])
        assert prediction_loss_only or torch.equal(ours[1], theirs[1])
    trainer.model.eval()
    plain.model.eval()
    inputs = trainer._prepare_inputs(dict(batch))
    (loss, outputs), (plain_loss, plain_outputs) = (
        t.compute_loss(t.model, dict(inputs), return_outputs=True) for t in (trainer, plain)
    )
    assert torch.equal(loss, plain_loss)
    assert torch.equal(outputs["logits"], plain_outputs["logits"])


@pytest.mark.parametrize("base", ["Trainer", "SFTTrainer"])
def test_evaluation_within_training_leaves_training_alone(make_trainer, base):
    """The penalty and the weights are those of a run that never evaluates."""

    evaluated = make_trainer(base, "procon_s:1", **EVALUATING)
    never = make_trainer(base, "procon_s:1", folder="never")
    for trainer in (evaluated, never):
        trainer.train()
    assert penalties(evaluated) == penalties(never)
    weights = dict(never.model.named_parameters())
    assert all(torch.equal(weights[name], weight) for name, weight in evaluated.model.named_parameters())


@pytest.mark.parametrize("base", ["Trainer", "SFTTrainer"])
def test_the_best_checkpoint_is_what_the_record_speaks_of(make_trainer, tmp_path, base):
    """Training makes it worse, so the first is the best: the model, the folder and the record are of that one."""
    settings = {"eval_steps": 1, "save_steps": 1, "lr_scheduler_type": "constant", "learning_rate": 3.0}
    trainer = make_trainer(base, "procon_s:1", load_best_model_at_end=True, eval_strategy="steps", **settings)
    trainer.train()
    trainer.save_model()
    losses = {row["step"]: row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row}
    best = min(losses, key=losses.__getitem__)
    assert best < 4
    assert trainer.best == {"step": best, "metric": "eval_loss", "value": losses[best]}
    of_best, kept = (load_file(tmp_path / "out" / name / "model.safetensors") for name in (f"checkpoint-{best}", "."))
    assert all(torch.equal(weight, kept[name]) for name, weight in of_best.items())
    record = json.loads((tmp_path / "out" / "procon.json").read_text())
    assert record["best"] == trainer.best
    assert record["did"]["steps"] == record["did"]["constrained_steps"] == best
    assert len(penalties(trainer)) == 4

    checkpoint = tmp_path / "out" / f"checkpoint-{best}"
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(ProConError, match=r"model.safetensors' is missing, or not as it was written"):
        trainer._load_best_model()
