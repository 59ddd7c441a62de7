"""``procon train`` on evaluation data: the loss on them, the best checkpoint, early stopping, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from procon.cli import main
from procon.cli.parsing import parse
from procon.data import load_conversations, padding_collator, tokenize_conversations

TRAIN = [
    *("train", "model", "data.jsonl", "--directions", "directions.safetensors", "--drift_steps", "0"),
    *("--output_dir", "tuned", "--logging_steps", "1", "--lr_scheduler_type", "constant"),
]


@pytest.fixture
def here(place, random_directions, tiny_model) -> Path:
    """The current folder: a model, its directions, data to train on, and data on which training makes it worse."""
    random_directions(tiny_model()).save("directions.safetensors")
    rows = [{"prompt": f"count to {n}", "completion": "x y z " * 3} for n in range(4)]
    Path("other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


def log() -> list[dict]:
    return json.loads(Path("tuned/trainer_state.json").read_text())["log_history"]


def test_the_best_checkpoint_is_what_the_folder_holds(here, capsys):
    """And what record, card and console speak of, though training went on; it ended early, as no loss was lower."""
    flags = ["--eval_data", "other.jsonl", "--eval_strategy", "steps", "--eval_steps", "1", "--max_steps", "40"]
    flags += ["--early_stopping_patience", "3", "--learning_rate", "3e-2"]
    assert main([*TRAIN, *flags]) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    losses = {row["step"]: row["eval_loss"] for row in log() if "eval_loss" in row}
    best = min(losses, key=losses.__getitem__)
    assert list(losses) == list(range(1, best + 4))  # three more than the best one
    kept, of_best, last = (
        load_file(Path("tuned", folder, "adapter_model.safetensors"))
        for folder in ("", f"checkpoint-{best}", f"checkpoint-{best + 3}")
    )
    assert all(torch.equal(kept[name], of_best[name]) for name in of_best)
    assert not all(torch.equal(kept[name], last[name]) for name in last)
    record = json.loads(Path("tuned/procon.json").read_text())
    assert record["best"] == {"step": best, "metric": "eval_loss", "value": losses[best]}
    assert record["did"]["steps"] == record["did"]["constrained_steps"] == best
    card = " ".join(Path("tuned/README.md").read_text().split())
    assert f"the checkpoint of step {best}, with the best eval_loss, {losses[best]:.4g}" in card
    assert f"| {best} of {best} |" in card
    words = " ".join(said.split())
    assert "evaluation 4 samples, every 1 steps; the best checkpoint is kept" in words
    assert f"Kept: the checkpoint of step {best}, with the lowest loss, {losses[best]:.4g}." in words
    # Every step was under the constraint, those after an evaluation too, and the loss on the data has no penalty in it.
    assert len([row for row in log() if row.get("procon/penalty", -1) >= 0]) == best + 3


def test_the_loss_is_cross_entropy_alone(here, tiny_model, tokenizer):
    """Of a part of the training data that is kept out of training."""
    flags = ["--eval_share", "0.25", "--num_train_epochs", "1", "--procon_schedule", "50", "--method", "full"]
    assert main([*TRAIN, *flags]) == 0
    (row,) = [row for row in log() if "eval_loss" in row]
    assert row["step"] == 2  # twelve samples of sixteen
    kept = load_conversations("data.jsonl").train_test_split(test_size=4, seed=42)["test"]
    samples: Dataset = tokenize_conversations(kept, tokenizer)
    model = AutoModelForCausalLM.from_pretrained("tuned")
    with torch.no_grad():
        loss = model(**padding_collator(tokenizer)(list(samples))).loss
    assert row["eval_loss"] == pytest.approx(float(loss), rel=1e-5)


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        ([], ("no", "steps", False, 500)),
        (["--eval_data", "d"], ("epoch", "steps", False, 500)),
        (["--eval_split", "test", "--eval_steps", "7"], ("steps", "steps", False, 500)),
        (["--eval_share", "0.1", "--early_stopping_patience", "2"], ("epoch", "epoch", True, 500)),
        (["--eval_data", "d", "--eval_steps", "7", "--load_best_model_at_end"], ("steps", "steps", True, 7)),
        (
            ["--eval_data", "d", "--eval_strategy", "steps", "--early_stopping_patience", "1"],
            ("steps", "steps", True, 10),
        ),
        (["--eval_data", "d", "--load_best_model_at_end", "--save_strategy", "best"], ("epoch", "best", True, 500)),
    ],
)
def test_what_follows_from_the_settings(flags, found):
    _, config = parse("train", ["m", "d.jsonl", *flags])
    values = (config.eval_strategy, config.save_strategy, config.load_best_model_at_end, config.save_steps)
    assert tuple(getattr(value, "value", value) for value in values) == found


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--eval_strategy", "steps"], "eval_strategy is set, and there is nothing to evaluate on: give --eval_data"),
        (["--early_stopping_patience", "2"], "and there is nothing to evaluate on: give --eval_data"),
        (["--eval_share", "0.5", "--eval_data", "other.jsonl"], "eval_share and eval_data are both set: choose one"),
        (["--eval_share", "1"], "eval_share is 1: give a share, 0 or more and less than 1"),
        (["--eval_share", "0.001"], "eval_share is 0.001, which is 0 of the 16 samples: give a share that leaves"),
        (["--eval_split", "test"], "eval_split is 'test', and data 'data.jsonl' is a file: leave it out"),
        (["--eval_data", "none.jsonl"], "data file 'none.jsonl' does not exist"),
        (["--eval_data", "other.jsonl", "--eval_strategy", "no"], "eval_data is set, and eval_strategy is 'no'"),
        (["--eval_share", "0.5", "--metric_for_best_model", "accuracy"], "procon train measures the loss alone"),
        (["--early_stopping_patience", "-1"], "early_stopping_patience is -1: give 0 or more"),
        (
            ["--eval_share", "0.5", "--early_stopping_patience", "1", "--load_best_model_at_end", "false"],
            "load_best_model_at_end is false, so the last checkpoint would be kept",
        ),
        (
            ["--eval_share", "0.5", "--load_best_model_at_end", "--save_strategy", "no"],
            "requires the save and eval strategy to match",
        ),
    ],
)
def test_what_contradicts_itself_is_refused_before_a_model_is_read(here, flags, message, monkeypatch, capsys):
    monkeypatch.setattr("procon.cli.train.load_model", lambda *_, **__: pytest.fail("a model was read"))
    assert main([*TRAIN, *flags]) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
    assert not Path("tuned").exists()
