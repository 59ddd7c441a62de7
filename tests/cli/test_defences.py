"""``procon train --defence``: the registry from the command line."""

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from procon.cli import main
from procon.cli import train as command
from procon.cli.arguments import TrainArguments
from procon.defences import DEFENCES
from procon.directions import Directions

TRAIN = [
    *("train", "--model", "model", "--data", "data.jsonl", "--output-dir", "out", "--max-steps", "1"),
    *("--drift-steps", "0", "--max-length", "64", "--save-strategy", "no"),
]
DIRECTIONS = ["--directions", "directions.safetensors"]
SAFETY = ["--safety-data", "safety.jsonl"]


@pytest.fixture
def here(place, random_directions, tiny_model):
    """The current folder: a model, data, directions, and a base and safety data of one's own."""
    model = tiny_model()
    random_directions(model).save("directions.safetensors")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    model.save_pretrained("base")
    for file in Path("model").glob("token*"):
        Path("base", file.name).write_bytes(file.read_bytes())
    for file in Path("model").glob("*.jinja"):
        Path("base", file.name).write_bytes(file.read_bytes())
    Path("safety.jsonl").write_text('{"prompt": "Steal.", "completion": "No."}\n' * 3)
    return place


@pytest.fixture
def built(monkeypatch) -> dict:
    """What the command hands to ``build_trainer``."""
    seen: dict = {}
    original = command.build_trainer

    def build(name, model, args, **given):
        seen.update(given, name=name, args=args)
        return original(name, model, args, **given)

    monkeypatch.setattr(command, "build_trainer", build)
    return seen


def test_train_by_name_writes_an_adapter(here, built, capsys):
    code = main(
        [*TRAIN, "--defence", "lisa", *SAFETY, "--defence-settings", "alignment_steps=1, user_steps=2,rho=1e-1"]
    )
    assert code == 0, capsys.readouterr().err
    assert built["settings"] == {"alignment_steps": 1, "user_steps": 2, "rho": 0.1}
    assert built["directions"] is None
    assert len(built["train_dataset"]) == 16  # alignment data stay apart
    assert len(built["alignment_dataset"]) == 3
    assert load_file("out/adapter_model.safetensors")
    assert json.loads(Path("out/log.jsonl").read_text().splitlines()[-1])["step"] == 1


def test_values_may_be_lists_with_commas(here, built):
    assert main([*TRAIN, "--defence", "sppft", "--defence-settings", "blocks=[0, 2]"]) == 0
    assert built["settings"] == {"blocks": [0, 2]}
    weights = load_file("out/adapter_model.safetensors")
    moved = {name.split("layers.")[1][0] for name, weight in weights.items() if "lora_B" in name and weight.any()}
    assert moved == {"1"}


def test_safety_samples_are_mixed_in_where_the_name_says_so(here, built):
    assert main([*TRAIN, "--defence", "safe", *SAFETY]) == 0
    assert len(built["train_dataset"]) == 16 + 3


def test_a_number_of_safety_samples_wins(here, built):
    assert main([*TRAIN, "--defence", "procon_s_safe", *SAFETY, "--safety-samples", "5", *DIRECTIONS]) == 0
    assert len(built["train_dataset"]) == 16 + 5
    assert built["args"].procon_schedule == "procon_s"
    assert Directions.load("out").hash == built["directions"].hash


def test_a_schedule_that_is_given_wins(here, built):
    assert main([*TRAIN, "--defence", "procon_wu", "--procon-schedule", "procon_s:0.3", *DIRECTIONS]) == 0
    assert built["args"].procon_schedule == "procon_s:0.3"


def test_safe_lora_takes_its_base(here, built, capsys):
    code = main([*TRAIN, "--defence", "safe_lora", "--base", "base", "--defence-settings", "threshold=0.5"])
    assert code == 0, capsys.readouterr().err
    assert built["base"] == "base"


def test_steering_finds_its_directions_again(here, built):
    """Of a run that is resumed."""
    saving = [*TRAIN, "--save-strategy", "steps", "--save-steps", "1", "--defence", "steering"]
    given = Directions.load("directions.safetensors")
    given.save("out/refusal-directions.safetensors")  # as extraction leaves them
    assert main([*saving, *DIRECTIONS]) == 0
    assert main([*saving, "--resume", "--max-steps", "2"]) == 0
    assert built["directions"].hash == given.hash


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--defence", "liza"], "there is no defence 'liza': did you mean 'lisa'?"),
        (["--defence", "lisa", "--defence-settings", "rh=1"], "no setting 'rh': did you mean 'rho'?"),
        (["--defence", "lisa", "--defence-settings", "rho"], "defence_settings has 'rho': give key=value"),
        (["--defence", "lisa", "--defence-settings", "rho=[1"], "defence_settings has 'rho=[1': give key=value"),
        (["--defence", "safe_lora"], "defence 'safe_lora' needs base: pass base"),
        (["--defence", "lisa", "--procon-schedule", "procon_s:0.3"], "'lisa' has no projection constraint"),
        (["--defence", "lisa", "--base", "base"], "base is 'base', but there is no defence to take it"),
        (["--defence-settings", "rho=1"], "defence_settings is 'rho=1', but there is no defence to take it"),
    ],
)
def test_bad_settings_are_one_line_and_leave_nothing(here, capsys, argv, message):
    assert main([*TRAIN, *argv]) == 2
    *_, line = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("procon: error: ")
    assert message in line
    assert not Path("out").exists()


def test_every_defence_is_on_the_page():
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "defences.md").read_text()
    for name, defence in DEFENCES.items():
        assert f"`{name}`" in page
        for setting in defence.settings:
            assert f"`{setting}=" in page, f"{name}: {setting}"


def test_help_names_every_defence():
    (text,) = (field.metadata["help"] for field in fields(TrainArguments) if field.name == "defence")
    assert re.findall(r"[a-z_]+", text.split(";")[0].replace(" or ", " ")) == list(DEFENCES)
