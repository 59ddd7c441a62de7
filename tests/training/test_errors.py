"""Bad input that shows only while `procon train` runs: one line, exit code 2, and no half-written output."""

import json
from pathlib import Path

import pytest
import torch

from procon.cli import main
from procon.models import find_decoder
from procon.training import run_folder


@pytest.fixture
def place(tiny_model, tokenizer, tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    tiny_model().save_pretrained("model")
    tokenizer.save_pretrained("model")
    write_data(range(1, 9))
    return tmp_path


def write_data(numbers, first_role: str = "user") -> None:
    rows = [
        {
            "messages": [
                {"role": first_role, "content": f"count to {n}"},
                {"role": "assistant", "content": " ".join(map(str, range(n)))},
            ]
        }
        for n in numbers
    ]
    Path("data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def train(*more: str) -> int:
    return main(
        [
            *("train", "--model", "model", "--data", "data.jsonl", "--output_dir", "out", "--dtype", "float32"),
            *("--procon_schedule", "procon_s", "--num_train_epochs", "2", "--per_device_train_batch_size", "2"),
            *("--save_steps", "4", "--drift_steps", "0", "--disable_tqdm", "true", "--procon_terms", "both", *more),
        ]
    )


def error_line(capsys) -> str:
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("procon: error:")]
    assert len(lines) == 1
    return lines[0]


@pytest.fixture
def any_data(monkeypatch) -> None:
    """A resumed run may have other data than the one that it goes on from."""
    monkeypatch.setattr(run_folder, "_rows", lambda *_: [])


@pytest.mark.parametrize("workers", ["0", "1"])
def test_sample_that_has_no_anchors(place, capsys, any_data, workers):
    assert train("--max_steps", "4") == 0
    before = sorted(place.rglob("*"))
    write_data(range(2, 10))
    assert train("--resume", "--dataloader_num_workers", workers) == 2
    line = error_line(capsys)
    assert "count to 9" in line
    assert "has no anchors" in line
    assert "Traceback" not in line
    assert sorted(place.rglob("*")) == before


def test_labels_that_changed_since_the_anchors_were_recorded(place, capsys, any_data, monkeypatch):
    assert train("--max_steps", "4") == 0
    # The same tokens, but with the first of each response taken for the prompt's.
    import procon.data.tokens as data

    original = data.response_mask

    def shorter(*args, **kwargs):
        ids, mask = original(*args, **kwargs)
        mask[mask.index(True)] = False
        return ids, mask

    monkeypatch.setattr(data, "response_mask", shorter)
    assert train("--resume") == 2
    assert "has no anchors with these labels" in error_line(capsys)


def test_hidden_states_that_are_not_finite(place, tiny_model, capsys):
    model = tiny_model()
    torch.nn.init.constant_(find_decoder(model).blocks[1].mlp.down_proj.weight, float("nan"))
    model.save_pretrained("model")
    assert train() == 2
    assert "hidden states entering block 2 are NaN or infinite" in error_line(capsys)
    assert not list(Path("out").glob("*"))
