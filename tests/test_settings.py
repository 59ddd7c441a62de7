"""One set of defaults behind every door, and a wrong setting refused at each of them before a model is read."""

import ast
import importlib
import inspect
import re
from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import procon
from procon import (
    AlphaSchedule,
    Anchors,
    Directions,
    ProConConfig,
    ProConError,
    ProConSettings,
    ProConTrainer,
    ProjectionConstraint,
)
from procon.cli import main
from procon.cli.arguments import TrainArguments
from procon.cli.parsing import parse
from procon.integrations import ProConCallback
from procon.settings import CHOICES, DEFAULTS, PAPER_RECIPE, check_setting, parse_blocks
from procon.training import ProConArguments, config

SETTINGS = [item.name for item in fields(ProConSettings)]

#: Trainers of TRL's that have a configuration of ours.
TRL_CONFIGS = ("sft", "dpo", "kto", "grpo")

#: A value that each setting cannot have, and what is said of it after its name.
WRONG = {
    "schedule": ("strong", "is not understood"),
    "scope": ("reply", "is 'reply': choose one of response, prompt, all"),
    "blocks": (1.5, "is the fraction 1.5: give one above 0"),
    "penalty": ("l2", "is 'l2': choose one of squared, absolute"),
    "anchors": ("remembered", "is 'remembered': choose one of recorded, live"),
    "terms": ("none", "is 'none': choose one of probes, tokens, both"),
    "probe_batch": (0, "is 0: give a whole number, 1 or more"),
    "probe_every": (0, "is 0: give a whole number, 1 or more"),
    "probe_weight": (-1.0, "is -1.0: give a finite number above 0"),
    "probe_reply_tokens": (-1, "is -1: give a whole number, 0 or more"),
}


class Untouchable:
    """A model, data or anchors that must not be looked at."""

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("__"):
            return object.__getattribute__(self, name)
        raise AssertionError(f"{name} was read before the settings were checked")


def directions() -> Directions:
    return Directions(torch.eye(3, 8)[:, None], torch.ones(3, 1))


def default_of(function: Callable, parameter: str) -> Any:
    return inspect.signature(function).parameters[parameter].default


def test_every_door_has_the_defaults():
    doors = {
        (ProjectionConstraint, ("blocks", "penalty")),
        (Anchors.record, ("scope",)),
        (ProConSettings, tuple(SETTINGS)),
    }
    for door, settings in doors:
        for setting in settings:
            assert default_of(door, setting) == getattr(DEFAULTS, setting), (door, setting)
    assert ProConCallback()._settings == DEFAULTS
    for made in (ProConArguments(), ProConConfig("out"), parse("train", ["--model", "m", "--data", "d"])[1]):
        assert made.procon_settings() == DEFAULTS
        assert {setting: getattr(made, f"procon_{setting}") for setting in SETTINGS} == vars(DEFAULTS)
    assert AlphaSchedule.parse(DEFAULTS.schedule) == AlphaSchedule.constant()
    # And what an editor shows, which no program makes.
    shown = re.findall(r"^        procon_(\w+): .+ = (.+)$", inspect.getsource(config), re.MULTILINE)
    assert {name: ast.literal_eval(value) for name, value in shown} == vars(DEFAULTS)


def test_settings_are_checked_once_and_stay(tmp_path, tiny_model, random_directions, monkeypatch):
    with pytest.raises(FrozenInstanceError):
        DEFAULTS.penalty = "squared"
    first, *others = (ProConSettings("tokens", blocks=blocks) for blocks in ("8,9", [8, 9], (8, 9)))
    assert all(first == other for other in others)
    with pytest.raises(ProConError, match=r"^scope is of the tokens, which terms 'probes' leaves out: take"):
        ProConSettings(scope="response")
    with pytest.raises(ProConError, match=r"^probe_every is of the probes, which terms 'tokens' leaves out"):
        ProConSettings(terms="tokens", probe_every=3)
    assert ProConSettings(schedule="0", scope="response").schedule == "0"  # nothing is constrained, as asked
    model = tiny_model()
    args = ProConConfig(str(tmp_path / "out"), report_to=[], procon_terms="tokens")
    trainer = ProConTrainer(model, args, directions=random_directions(model))
    args.procon_penalty = "squared"  # too late to count
    assert trainer.procon.settings.penalty == "absolute"


def trl_config(kind: str) -> type:
    """The class of training arguments for a trainer of TRL's."""
    pytest.importorskip("trl", reason=f"{kind.upper()}Config is TRL's")
    module = "sft" if kind == "sft" else "preferences"
    return getattr(importlib.import_module(f"procon.training.{module}"), f"ProCon{kind.upper()}Config")


@pytest.mark.parametrize("kind", TRL_CONFIGS)
def test_trl_s_training_arguments_have_the_defaults(kind, tmp_path):
    made = trl_config(kind)(str(tmp_path), bf16=False)
    assert made.procon_settings() == DEFAULTS


def test_axolotl_s_keys_have_the_defaults():
    pytest.importorskip("axolotl", reason="axolotl is not installed")
    from procon.integrations.axolotl import AxolotlKeys, ProConAxolotlArguments

    assert all(value is None for value in AxolotlKeys().model_dump().values())
    assert ProConAxolotlArguments().procon_settings() == DEFAULTS
    assert {f"procon_{setting}" for setting in SETTINGS} < AxolotlKeys.model_fields.keys()


def test_the_op_alone_keeps_the_squared_magnitude():
    assert DEFAULTS.penalty == "absolute"
    for op in (procon.constrain, procon.projection_penalty, procon.rms_norm_constrain):
        assert default_of(op, "penalty") == "squared"


def test_the_paper_s_recipe_stands_once():
    lora = PAPER_RECIPE.lora()
    arguments = TrainArguments(model="m", data="d")
    assert (arguments.lora_r, arguments.lora_alpha) == (lora["r"], lora["lora_alpha"]) == (8, 16)
    assert lora["target_modules"] == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert arguments.lora_targets == "auto"  # which are these, in a model that has them
    assert parse("train", ["--model", "m", "--data", "d"])[1].learning_rate == PAPER_RECIPE.learning_rate == 2e-4


def test_every_setting_has_its_sentence_in_the_help(capsys):
    text = {item.name: item.metadata["help"] for item in fields(ProConSettings)}
    assert main(["train", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for setting, sentence in text.items():
        assert f"--procon_{setting}" in shown
        assert sentence in shown
        assert all(choice in sentence for choice in CHOICES.get(setting, ())), sentence


# Wrong values


@pytest.mark.parametrize("setting", WRONG)
def test_wrong_values_of_the_right_type(setting):
    wrong, message = WRONG[setting]
    with pytest.raises(ProConError, match=setting) as error:
        ProConSettings(**{setting: wrong})
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("setting", "values"),
    [
        ("blocks", ("some", "last", [], [True], 1, 0.0, {1}, ["all"], ["all", 3], [[1]], [0.5], b"all")),
        ("probe_batch", (-1, 1.5, True, "8", None)),
        ("probe_weight", (0, float("nan"), float("inf"), 10**400, True, "1", None)),
        ("probes", (7, "", ["file"])),
        ("anchors_dir", (7, ["file"])),
        ("schedule", (7, None)),
        ("penalty", (7, None)),
    ],
)
def test_wrong_values_of_any_type(setting, values):
    for value in values:
        with pytest.raises(ProConError, match=setting):
            ProConSettings(**{setting: value})


def test_every_door_refuses_a_wrong_value_before_it_reads_a_model(tmp_path, monkeypatch, tiny_model, random_directions):
    monkeypatch.chdir(tmp_path)
    nothing, found = Untouchable(), random_directions(tiny_model())
    late = ProConConfig("../out", report_to=[])
    late.procon_penalty = "l2"  # set on the object
    doors = {
        "penalty": [
            lambda: ProConCallback(penalty="l2"),
            lambda: ProjectionConstraint(directions(), penalty="l2"),
            lambda: ProConArguments(procon_penalty="l2"),
            lambda: ProConConfig("out", procon_penalty="l2"),
            lambda: ProConTrainer(tiny_model(), late, directions=found),
        ],
        "scope": [lambda: Anchors.record(nothing, nothing, nothing, "nowhere", scope="l2")],
        "backend": [lambda: ProjectionConstraint(found, backend="l2")],
        "fuse": [
            lambda: ProjectionConstraint(found).attach(tiny_model(), fuse="l2"),
            lambda: ProConCallback(fuse="l2"),
        ],
    }
    for setting, calls in doors.items():
        for call in calls:
            with pytest.raises(ProConError, match=f"{setting} is 'l2': choose one of"):
                call()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", TRL_CONFIGS)
def test_wrong_values_among_trl_s_training_arguments(kind, tmp_path):
    with pytest.raises(ProConError, match="procon_penalty is 'l2': choose one of"):
        trl_config(kind)(str(tmp_path), bf16=False, procon_penalty="l2")


def test_a_file_of_probes_that_is_not_there(tmp_path, tiny_model, tokenizer):
    """The trainer finds it before it extracts directions, which takes minutes."""
    args = ProConConfig(str(tmp_path / "out"), report_to=[], procon_probes="nowhere.txt")
    trainer = ProConTrainer(tiny_model(), args, processing_class=tokenizer, train_dataset=[{"input_ids": [1]}])
    trainer.procon._extract = lambda: pytest.fail("directions were extracted")
    with pytest.raises(ProConError, match=r"^prompt file 'nowhere\.txt' does not exist"):
        trainer.train()


@pytest.mark.parametrize("by", ["flag", "yaml"])
@pytest.mark.parametrize("setting", ["penalty", "probe_every", "blocks"])
def test_wrong_values_on_the_command_line(setting, by, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("procon.cli.train.load_model", lambda *args, **kwargs: pytest.fail("a model was read"))
    wrong, message = WRONG[setting]
    Path("settings.yaml").write_text(f"procon_{setting}: {wrong}\n")
    given = [f"--procon_{setting}", str(wrong)] if by == "flag" else ["--config", "settings.yaml"]
    assert main(["train", "--model", "nowhere", "--data", "nowhere/data", *given]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"procon_{setting}" in line
    assert message in line
    assert [path.name for path in tmp_path.iterdir()] == ["settings.yaml"]


@pytest.mark.parametrize("setting", ["penalty", "alpha"])
def test_wrong_values_among_axolotl_s_keys(setting):
    pytest.importorskip("axolotl", reason="axolotl is not installed")
    from procon.integrations.axolotl import ProConPlugin

    keys = {"plugins": ["procon.integrations.axolotl.ProConPlugin"], f"procon_{setting}": "strong"}
    with pytest.raises(ProConError, match=f"procon_{setting}"):
        ProConPlugin().register(keys)


def test_wrong_backend_in_the_environment(monkeypatch):
    monkeypatch.setenv("PROCON_BACKEND", "fast")
    with pytest.raises(ProConError, match="the environment variable PROCON_BACKEND is 'fast': choose one of"):
        ProConSettings()


# Blocks


@pytest.mark.parametrize(
    ("text", "blocks"),
    [
        ("all", "all"),
        ("0.5", 0.5),
        ("1.0", 1.0),
        ("1", [1]),
        ("8,9, 10", [8, 9, 10]),
        ("-1", [-1]),
        (" all ", "all"),
        (" 0.5 ", 0.5),
        ("8,-1", [8, -1]),
    ],
)
def test_blocks_from_a_text(text, blocks):
    assert parse_blocks(text) == blocks


@pytest.mark.parametrize("value", [None, True, b"all"])
def test_blocks_from_what_is_no_text(value):
    with pytest.raises(ProConError, match=r"procon_blocks is "):
        ProConArguments(procon_blocks=value)


@pytest.mark.parametrize(
    "text", ["", "half", "0.5,1", "1.5", "0.0", "8;9", "[8]", "8,", "all,8", "all,0.5", "last", "all,last"]
)
def test_texts_that_are_no_blocks(text):
    with pytest.raises(ProConError, match=r"^procon_blocks is"):
        parse_blocks(text, "procon_blocks")


@pytest.mark.parametrize("blocks", ["all", 0.5, np.float64(0.5), [0, 2], (1,), range(2), [np.int64(1)]])
def test_blocks_of_other_types(blocks):
    check_setting("blocks", blocks)
    assert ProjectionConstraint(directions(), blocks=blocks).blocks
