"""One set of defaults behind every door, and a wrong setting refused at each of them before a model is read."""

import importlib
import inspect
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
    ChatSettings,
    Directions,
    Probes,
    ProConConfig,
    ProConError,
    ProConSettings,
    ProConTrainer,
    ProjectionConstraint,
)
from procon.anchors import LiveAnchors
from procon.cli import main
from procon.cli.arguments import TrainArguments
from procon.cli.parsing import parse
from procon.integrations import ProConCallback
from procon.settings import (
    CHOICES,
    DEFAULTS,
    PAPER_RECIPE,
    check_alpha,
    check_setting,
    parse_blocks,
)
from procon.training import ProConArguments

SETTINGS = [item.name for item in fields(ProConSettings)]

#: Trainers of TRL's, and the anchors of training tokens that each one's configuration has by default: with preference
#: pairs and rollouts, probes alone keep most (docs/preferences-results.md).
TRL_CONFIGS = {"sft": "recorded", "dpo": "none", "kto": "none", "grpo": "none"}

#: A value that each setting cannot have, as a text, and what is said of it after its name.
WRONG = {
    "schedule": ("strong", "is not understood"),
    "scope": ("reply", "is 'reply': choose one of response, prompt, all"),
    "blocks": ("1.5", "is the fraction 1.5: give one above 0"),
    "penalty": ("l2", "is 'l2': choose one of squared, absolute, huber"),
    "units": ("metres", "is 'metres': choose one of raw, gap"),
    "anchors": ("remembered", "is 'remembered': choose one of recorded, live, none"),
    "probe_batch": ("0", "is 0: give a whole number, 1 or more"),
    "probe_every": ("0", "is 0: give a whole number, 1 or more"),
    "probe_weight": ("-1.0", "is -1.0: give a finite number above 0"),
    "probe_reply_tokens": ("-1", "is -1: give a whole number, 0 or more"),
}

#: Any text may be a file of probe prompts; whether it is one shows before a model is read, too.
NO_FILE = ("nowhere.txt", "prompt file 'nowhere.txt' does not exist")


class Untouchable:
    """A model, data or anchors that must not be looked at."""

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("__"):
            return object.__getattribute__(self, name)
        raise AssertionError(f"{name} was read before the settings were checked")


#: Of any type, beside the wrong value that each setting has.
NO_BLOCKS = ("some", [], [True], 1, 0.0, {1}, ["all", 3], [True, "last"], [["last"], "last"], [0.5, 0.5], b"last")


def directions() -> Directions:
    return Directions(torch.eye(3, 8)[:, None], torch.ones(3, 1))


def default_of(function: Callable, parameter: str) -> Any:
    return inspect.signature(function).parameters[parameter].default


def test_every_door_has_the_defaults():
    doors = {
        (ProjectionConstraint, ("blocks", "penalty", "units")),
        (Anchors.record, ("scope",)),
        (ProConSettings, tuple(SETTINGS)),
    }
    for door, settings in doors:
        for setting in settings:
            assert default_of(door, setting) == getattr(DEFAULTS, setting), (door, setting)
    assert default_of(Probes.record, "batch") == DEFAULTS.probe_batch
    assert ProConCallback()._settings == DEFAULTS
    for made in (ProConArguments(), ProConConfig("out"), parse("train", ["--model", "m", "--data", "d"])[1]):
        assert made.procon_settings() == DEFAULTS
        assert {setting: getattr(made, f"procon_{setting}") for setting in SETTINGS} == vars(DEFAULTS)
    assert AlphaSchedule.parse(DEFAULTS.schedule) == AlphaSchedule.constant()


def test_settings_are_checked_once_and_stay(tmp_path, tiny_model, random_directions, monkeypatch):
    with pytest.raises(FrozenInstanceError):
        DEFAULTS.penalty = "squared"
    assert ProConSettings(blocks="8,9") == ProConSettings(blocks=[8, 9]) == ProConSettings(blocks=(8, 9))
    with pytest.raises(ProConError, match="anchors and probes are both 'none', so nothing is constrained"):
        ProConSettings(anchors="none", probes="none")
    assert ProConSettings(anchors="none", probes="none", schedule="0").schedule == "0"
    model = tiny_model()
    args = ProConConfig(str(tmp_path / "out"), report_to=[], procon_probes="none")
    trainer = ProConTrainer(model, args, directions=random_directions(model))
    args.procon_penalty = "huber"  # too late to count
    assert trainer.procon.settings.penalty == "absolute"


@pytest.mark.parametrize("argv", [["directions"], ["train", "--data", "d"], ["eval"], ["drift", "--tuned", "m"]])
def test_commands_ask_a_model_by_the_defaults(argv):
    command, *given = argv
    model = "--start" if command == "drift" else "--model"
    assert parse(command, [model, "m", *given])[0].chat() == ChatSettings()


def trl_config(kind: str) -> type:
    """The class of training arguments for a trainer of TRL's."""
    pytest.importorskip("trl", reason=f"{kind.upper()}Config is TRL's")
    return getattr(importlib.import_module(f"procon.training.{kind}"), f"ProCon{kind.upper()}Config")


@pytest.mark.parametrize("kind", TRL_CONFIGS)
def test_trl_s_training_arguments_have_the_defaults(kind, tmp_path):
    made = trl_config(kind)(str(tmp_path), bf16=False)
    assert made.procon_settings() == ProConSettings(anchors=TRL_CONFIGS[kind])


def test_axolotl_s_keys_have_the_defaults():
    pytest.importorskip("axolotl", reason="axolotl is not installed")
    from procon.integrations.axolotl import AxolotlKeys, _arguments

    assert all(value is None for value in AxolotlKeys().model_dump().values())
    assert _arguments({}).procon_settings() == DEFAULTS
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


def wrong_values(setting: str) -> tuple[Any, ...]:
    """Values that ``setting`` cannot have: that of WRONG first, then some of other types."""
    if setting == "blocks":
        return (float(WRONG[setting][0]), *NO_BLOCKS)
    if setting in ("probe_batch", "probe_every"):
        return (int(WRONG[setting][0]), -1, 1.5, True, "8", None)
    if setting == "probe_reply_tokens":
        return (int(WRONG[setting][0]), 1.5, True, "8", None)
    if setting == "probe_weight":
        return (float(WRONG[setting][0]), 0, float("nan"), float("inf"), 10**400, True, "1", None)
    return (7, "", ["file"]) if setting in ("probes", "anchors_dir") else (WRONG[setting][0], 7, None)


def python_doors() -> dict[str, tuple[str, Callable[[Any], object]]]:
    """By an id, the setting and a call with one value of it; nothing else that the call is given may be read."""
    nothing = Untouchable()
    calls: dict[str, tuple[str, Callable[[Any], object]]] = {}

    def add(door: str, settings: list[str], call: Callable[..., object]) -> None:
        for setting in settings:
            calls[f"{door}-{setting}"] = setting, lambda value, setting=setting: call(**{setting: value})

    add("settings", [*WRONG], ProConSettings)
    add("callback", [*WRONG], ProConCallback)
    add("constraint", ["penalty", "units"], lambda **s: ProjectionConstraint(directions(), **s))
    add("record", ["scope"], lambda **s: Anchors.record(nothing, nothing, nothing, "nowhere", **s))
    return calls


@pytest.mark.parametrize("door", python_doors())
def test_wrong_values_at_python_s_doors(door, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    setting, call = python_doors()[door]
    name, values = door.rpartition("-")[2], wrong_values(setting)
    for value in values:
        with pytest.raises(ProConError) as error:
            call(value)
        assert name in str(error.value)
        assert WRONG[setting][1] in str(error.value) or value is not values[0]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [7, "", ["file"]])
def test_probes_are_words_or_a_file(value):
    with pytest.raises(ProConError, match=r"^probes is .*: give 'builtin', 'none', or the path of a file of prompts"):
        ProConSettings(probes=value)


def test_the_other_words(tiny_model, random_directions):
    model = tiny_model()
    constraint = ProjectionConstraint(random_directions(model))
    for call in (lambda: constraint.attach(model, fuse="maybe"), lambda: ProConCallback(fuse="maybe")):
        with pytest.raises(ProConError, match="fuse is 'maybe': choose one of auto, never"):
            call()
    for call in (
        lambda: ProjectionConstraint(random_directions(model), backend="cuda"),
        lambda: LiveAnchors(Untouchable(), Untouchable(), backend="cuda"),
    ):
        with pytest.raises(ProConError, match="backend is 'cuda': choose one of auto, triton, eager"):
            call()


@pytest.mark.parametrize("setting", WRONG)
def test_wrong_values_among_training_arguments(setting, tmp_path, tiny_model, random_directions):
    wrong, message = WRONG[setting]
    if setting.startswith("probe_"):  # not a text, unless it comes from a flag
        wrong = wrong_values(setting)[0]
    for made in (ProConArguments, lambda **settings: ProConConfig(str(tmp_path), **settings)):
        with pytest.raises(ProConError, match=f"procon_{setting}") as error:
            made(**{f"procon_{setting}": wrong})
        assert message in str(error.value)
    # Set on the object, they are refused by the trainer, before it records anything.
    args = ProConConfig(str(tmp_path / "out"), report_to=[])
    setattr(args, f"procon_{setting}", wrong)
    model = tiny_model()
    with pytest.raises(ProConError, match=f"procon_{setting}"):
        ProConTrainer(model, args, directions=random_directions(model))


@pytest.mark.parametrize("kind", TRL_CONFIGS)
def test_wrong_values_among_trl_s_training_arguments(kind, tmp_path):
    for setting, (text, message) in WRONG.items():
        wrong = wrong_values(setting)[0] if setting.startswith("probe_") else text
        with pytest.raises(ProConError, match=f"procon_{setting}") as error:
            trl_config(kind)(str(tmp_path), bf16=False, **{f"procon_{setting}": wrong})
        assert message in str(error.value)


def test_a_file_of_probes_that_is_not_there(tmp_path, tiny_model, tokenizer):
    """The trainer finds it before it extracts directions, which takes minutes."""
    args = ProConConfig(str(tmp_path / "out"), report_to=[], procon_anchors="none", procon_probes=NO_FILE[0])
    trainer = ProConTrainer(tiny_model(), args, processing_class=tokenizer, train_dataset=[{"input_ids": [1]}])
    trainer.procon._extract = lambda: pytest.fail("directions were extracted")
    with pytest.raises(ProConError, match=f"^{NO_FILE[1]}"):
        trainer.train()


@pytest.mark.parametrize("by", ["flag", "yaml"])
@pytest.mark.parametrize("setting", WRONG)
def test_wrong_values_on_the_command_line(setting, by, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("procon.cli.train.load_model", lambda *args, **kwargs: pytest.fail("a model was read"))
    wrong, message = WRONG[setting]
    Path("settings.yaml").write_text(f"procon_{setting}: {wrong}\n")
    given = [f"--procon_{setting}", wrong] if by == "flag" else ["--config", "settings.yaml"]
    assert main(["train", "--model", "nowhere", "--data", "nowhere/data", *given]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"procon_{setting}" in line
    assert message in line
    assert [path.name for path in tmp_path.iterdir()] == ["settings.yaml"]


@pytest.mark.parametrize("setting", [*WRONG, "alpha"])
def test_wrong_values_among_axolotl_s_keys(setting):
    pytest.importorskip("axolotl", reason="axolotl is not installed")
    from procon.integrations.axolotl import ProConPlugin

    wrong = "strong" if setting == "alpha" else WRONG[setting][0]
    if setting.startswith("probe_"):
        wrong = wrong_values(setting)[0]
    keys = {"plugins": ["procon.integrations.axolotl.ProConPlugin"], f"procon_{setting}": wrong}
    with pytest.raises(ProConError, match=f"procon_{setting}"):
        ProConPlugin().register(keys)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["directions", "--model", "m", "--k", "9"], "k is 9: give 1 to 8"),
        (["directions", "--model", "m", "--batch_size", "0"], "batch_size is 0: give 1 or more"),
        (["directions", "--model", "m", "--dtype", "int8"], "dtype is 'int8': choose one of"),
        (["eval", "--model", "m", "--dtype", "int8"], "dtype is 'int8': choose one of"),
        (["drift", "--start", "m", "--tuned", "m", "--dtype", "int8"], "dtype is 'int8': choose one of"),
        (["train", "--model", "m", "--data", "d", "--safety_samples", "-1"], "safety_samples is -1: give 0 or more"),
        (
            ["train", "--model", "m", "--data", "d", "--procon_probes", NO_FILE[0]],
            NO_FILE[1],
        ),
        (["train", "--model", "m", "--data", "d", "--drift_steps", "-1"], "drift_steps is -1: give 0 or more"),
        (["train", "--model", "m", "--data", "d", "--lora_r", "0"], "lora_r is 0: give 1 or more"),
        (["train", "--model", "m", "--data", "d", "--method", "qlora"], "method is 'qlora': choose one of lora, full"),
    ],
)
def test_the_commands_own_settings(command, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for module in ("procon.cli.train", "procon.cli.commands"):
        monkeypatch.setattr(f"{module}.load_model", lambda *args, **kwargs: pytest.fail("a model was read"))
    assert main(command) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


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
        ("last", "last"),
        (" all, last ", ["all", "last"]),
        ("last,0.5", ["last", 0.5]),
        ("8,9,last", [8, 9, "last"]),
    ],
)
def test_blocks_from_a_text(text, blocks):
    assert parse_blocks(text) == blocks


@pytest.mark.parametrize("value", [None, True, b"all"])
def test_blocks_from_what_is_no_text(value):
    with pytest.raises(ProConError, match=r"procon_blocks is "):
        ProConArguments(procon_blocks=value)


@pytest.mark.parametrize(
    "text",
    ["", "half", "0.5,1", "1.5", "0.0", "8;9", "[8]", "all,8", "all,0.5", "1.5,last", "all,0.5,last", "last,"],
)
def test_texts_that_are_no_blocks(text):
    with pytest.raises(ProConError, match=r"^procon_blocks is"):
        parse_blocks(text, "procon_blocks")


@pytest.mark.parametrize("blocks", ["all", 0.5, np.float64(0.5), [0, 2], (1,), range(2), [np.int64(1)]])
def test_blocks_of_other_types(blocks):
    check_setting("blocks", blocks)
    assert ProjectionConstraint(directions(), blocks=blocks).blocks


def test_a_number_that_no_float_can_hold_is_refused():
    with pytest.raises(ProConError, match=r"probe_weight is 1000.*: give a finite number above 0"):
        ProConSettings(probe_weight=10**400)
    with pytest.raises(ProConError, match=r"alpha is 1000.*: give a finite number, 0 or more"):
        check_alpha(10**400)
