"""``procon directions`` for other concepts than refusal, and training along them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from procon.cli import main
from procon.directions import Directions

FIND = ["directions", "--model", "model", "--dtype", "float32"]
CONCEPT = [*FIND, "--positive", "french.txt", "--negative", "english.txt", "--name", "french"]


@pytest.fixture(autouse=True)
def files(place) -> Path:
    Path("french.txt").write_text("\n".join(f"bonjour {n}" for n in range(10)))
    Path("english.txt").write_text("\n".join(f"hello {n}" for n in range(12)))
    save_file({"1": torch.ones(32)}, "probe.safetensors")
    unit = torch.nn.functional.normalize(torch.ones(4, 32))
    Directions(unit[:, None], torch.ones(4, 1), last_output=True).save("refusal.safetensors")
    return place


def test_of_prompts_beside_refusal_then_trained_along(capsys):
    assert main([*CONCEPT, "--add", "refusal.safetensors", "--output", "both.safetensors"]) == 0
    printed = capsys.readouterr().out
    assert "Concepts: refusal, french." in printed
    assert "refuses" not in printed  # no replies are generated for another concept
    found = Directions.load("both.safetensors")
    assert found.concepts == ("refusal", "french")
    assert found.auroc[1:, 1].isfinite().all()
    assert found.provenance["concepts"]["french"]["counts"] == {"positive": 8, "negative": 10}

    train = ["train", "--model", "model", "--data", "data.jsonl", "--directions", "both.safetensors", "--use_cpu"]
    train += ["--output_dir", "out", "--max_steps", "1", "--drift_steps", "0", "--dtype", "float32"]
    assert main([*train, "--per_device_train_batch_size", "2", "--procon_units", "gap"]) == 0
    record = json.loads(Path("out/procon.json").read_text())
    assert record["concepts"] == ["refusal", "french"]
    assert record["did"]["constrained_steps"] == 1
    assert Directions.load("out").hash == found.hash
    assert "along directions of refusal, french" in Path("out/README.md").read_text()


def test_of_given_vectors(capsys):
    assert main([*FIND, "--vectors", "probe.safetensors", "--name", "probe", "--output", "p.safetensors"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["1", "probe", "-", "-"] in rows
    assert ["0", "no", "direction", "-", "-"] in rows
    found = Directions.load("p.safetensors")
    assert found.usable.tolist() == [False, True, False, False]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([*FIND, "--positive", "french.txt"], "positive and negative prompts belong together: give --positive and"),
        ([*FIND, "--name", "french"], "another concept than refusal needs a name, and prompts or vectors: give --name"),
        ([*FIND, "--vectors", "probe.safetensors"], "another concept than refusal needs a name"),
        ([*CONCEPT, "--malicious", "french.txt"], "malicious, benign and k are of refusal directions: leave them out"),
        ([*CONCEPT, "--k", "2"], "malicious, benign and k are of refusal directions"),
        ([*CONCEPT[:-1], "two words"], "the name of a concept is 'two words'"),
        ([*CONCEPT[:-1], "refusal", "--add", "refusal.safetensors"], "two concepts are named 'refusal'"),
        ([*FIND, "--add", "refusal.safetensors"], "two concepts are named 'refusal'"),
        ([*CONCEPT, "--add", "none"], "directions file 'none' does not exist"),
        ([*FIND, "--vectors", "none", "--name", "probe"], "vectors file 'none' does not exist"),
        ([*CONCEPT, "--vectors", "probe.safetensors"], "another concept than refusal needs a name, and prompts or"),
    ],
)
def test_bad_input_is_one_line_before_a_model_is_loaded(argv, message, capsys, monkeypatch):
    monkeypatch.setattr("procon.cli.commands.load_model", lambda *_, **__: pytest.fail("it was loaded"))
    assert main([*argv, "--output", "new.safetensors"]) == 2
    line = capsys.readouterr().err
    assert line.startswith("procon: error: ")
    assert message in line
    assert line.count("\n") == 1
    assert not Path("new.safetensors").exists()
