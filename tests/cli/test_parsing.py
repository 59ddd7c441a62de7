"""Settings from flags and YAML, help, and bad input as one line: all of it before torch is imported."""

import re
import resource
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from transformers import TrainingArguments

from procon.cli import main
from procon.cli.parsing import COMMANDS, parse, settings_of
from procon.data import parse_columns
from procon.errors import ProConError
from procon.schedule import AlphaSchedule
from procon.settings import ChatSettings
from procon.training import ProConConfig
from procon.version import __version__

LIGHT = """
import sys; from procon.cli import main; code = main(sys.argv[1:])
print(code, [name for name in ("torch", "transformers", "numpy", "datasets") if name in sys.modules])
"""


def run_lightly(argv: list[str], folder: Path) -> tuple[str, str, float]:
    """What a command prints and complains of, and its seconds of CPU."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-c", LIGHT, *argv]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return result.stdout, result.stderr, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize(
    ("argv", "shown"),
    [
        ([], "\n  train "),
        (["--help"], "\n  report "),
        (["--version"], f"procon {__version__}\n"),
        (["train", "--help"], "usage: procon train MODEL DATA [settings]"),
        (["help", "eval"], "usage: procon eval MODEL [settings]"),
    ],
)
def test_help_comes_at_once(argv, shown, tmp_path):
    out, err, seconds = run_lightly(argv, tmp_path)
    assert shown in out
    assert out.endswith("0 []\n")
    assert err == ""
    assert seconds < 1


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["tain"], "there is no command 'tain'; did you mean 'train'?"),
        (["xyzzy"], "there is no command 'xyzzy': choose one of quickstart, directions, train"),
        (["train"], "the following arguments are required: --model, --data; see 'procon train --help'"),
        (["train", "m", "d", "--modle", "x"], "there is no setting '--modle'; did you mean '--model'?"),
        (
            ["train", "m", "d", "--adam-epsilo=1"],
            "there is no setting '--adam_epsilo=1'; did you mean '--adam_epsilon'",
        ),
        (["train", "m", "d", "--adam-beta1", "x"], "argument --adam_beta1: 'x' is not a number; see"),
        (["train", "m", "d", "--lora_r", "8.5"], "argument --lora_r: '8.5' is not a whole number; see"),
        (["train", "m", "d", "--procon_scope", "reply"], "procon_scope is 'reply': choose one of response"),
        (["train", "m", "none.jsonl"], "data 'none.jsonl' does not exist: check the path"),
        (["train", "./m", "d"], "model './m' cannot be loaded (there is no such file or folder): give a folder"),
        (["train", "m", "--config", "none.yaml"], "config 'none.yaml' does not exist: check the path"),
        (["eval", "m", "--malicious", "none.txt"], "malicious 'none.txt' does not exist: check the path"),
        (["report", "none.json"], "runs 'none.json' does not exist: check the path"),
    ],
)
def test_what_is_wrong_is_said_at_once(argv, said, tmp_path):
    out, err, seconds = run_lightly(argv, tmp_path)
    assert err.startswith(f"procon: error: {said}")
    assert err.count("\n") == 1
    assert out == "2 []\n"
    assert seconds < 1


@pytest.mark.parametrize("name", COMMANDS)
def test_help_lists_each_setting_once(name, capsys):
    assert main([name, "--help"]) == 0
    text = capsys.readouterr().out
    listed = [setting for setting in settings_of(name).values() if setting.group]
    assert sorted(re.findall(r"^  --(\w+)", text, flags=re.MULTILINE)) == sorted(setting.name for setting in listed)
    assert all(setting.help.strip() for setting in listed)
    assert "None" not in text


def test_training_arguments_are_those_of_the_installed_transformers():
    """Names and defaults read in the source, against the class."""
    settings = settings_of("train")
    own = {field.name: field for field in fields(TrainingArguments)}
    assert own.keys() == settings.keys() & own.keys()
    assert {field.name for field in fields(ProConConfig)} - settings.keys() == set()
    for name in own.keys() - {"output_dir", "learning_rate", "logging_steps", "report_to"}:
        if settings[name].default is not None:
            assert settings[name].default == own[name].default, name


def test_help_shows_defaults_and_choices(capsys):
    assert main(["train", "--help"]) == 0
    words = " ".join(capsys.readouterr().out.split())
    assert re.search(r"--model VALUE [^-]*\(required\)", words)
    assert "--method {lora,full}" in words
    assert "--procon_penalty {squared,absolute}" in words
    assert "(default: 0.0002)" in words
    assert "--adam_beta1" not in words


@pytest.mark.parametrize(
    ("argv", "found"),
    [
        (["eval", "m"], {"model": "m"}),
        (["eval", "m", "--batch-size", "2"], {"model": "m", "batch_size": "2"}),
        (["drift", "a", "b"], {"start": "a", "tuned": "b"}),
        (["drift", "a", "--tuned", "b"], {"start": "a", "tuned": "b"}),
        (["train", "m", "d", "--flatten"], {"model": "m", "data": "d", "flatten": True}),
        (["quickstart", "--model", "m", "--output-dir=q"], {"model": "m", "output_dir": "q"}),
    ],
)
def test_words_and_flags(argv, found):
    parsed = parse(argv[0], argv[1:])[0]
    assert {name: getattr(parsed, name) for name in found} == found


def test_defaults_of_training():
    arguments, config = parse("train", ["--model", "m", "--data", "d"])
    assert (arguments.model, arguments.data, arguments.method, arguments.resume) == ("m", "d", "lora", False)
    assert (config.learning_rate, config.output_dir, config.report_to) == (2e-4, "procon-output", [])
    assert (config.procon_schedule, config.procon_scope, config.procon_penalty) == ("procon_s", "all", "absolute")


@pytest.mark.parametrize(
    ("flags", "strategy"),
    [
        ([], "no"),
        (["--eval_data", "d"], "epoch"),
        (["--eval_split", "test", "--eval_steps", "7"], "steps"),
        (["--eval_data", "d", "--eval_strategy", "no"], "no"),
    ],
)
def test_evaluation_data_are_evaluated_on(flags, strategy):
    assert parse("train", ["m", "d", *flags])[1].eval_strategy == strategy


YAML = """
model: from-yaml          # a comment
data: d
flatten: yes
lora_targets: [q_proj, v_proj]
learning-rate: 3e-4
max_length: 99
save_strategy: no
save_only_model: true
procon_terms: tokens
procon_schedule: 0.5
procon_blocks: [1, 2]
directions: ~
adam_beta1: 0.8
label_names: [labels]
lr_scheduler_kwargs: {num_cycles: 2}
chat_template_kwargs: {enable_thinking: true, reasoning_effort: low}
system_prompt: Be kind.
data_columns: [prompt=Q, response=A]
device_map: {model: cpu, lm_head: disk}
"""


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "settings.yaml"
    path.write_text(YAML)
    return path


def test_yaml_settings_are_read_as_flags_are(file):
    arguments, config = parse("train", ["--config", str(file)])
    assert (arguments.model, arguments.flatten, arguments.max_length) == ("from-yaml", True, 99)
    assert arguments.lora_targets == "q_proj,v_proj"
    assert arguments.directions is None
    assert (config.learning_rate, config.adam_beta1) == (3e-4, 0.8)
    assert (config.save_strategy, config.save_only_model) == ("no", True)
    assert AlphaSchedule.parse(config.procon_schedule).phases[0].alpha == 0.5
    assert config.procon_settings().blocks == (1, 2)
    assert config.label_names == ["labels"]
    assert config.lr_scheduler_kwargs == {"num_cycles": 2}
    assert arguments.chat() == ChatSettings("Be kind.", {"enable_thinking": True, "reasoning_effort": "low"})
    assert arguments.loading()["device_map"] == {"model": "cpu", "lm_head": "disk"}
    assert parse_columns(arguments.data_columns) == {"prompt": "Q", "response": "A"}


@pytest.mark.parametrize("config_first", [True, False])
def test_flags_win_over_yaml(file, config_first):
    flags = ["--model", "from-flag", "--learning-rate", "1e-3", "--flatten", "false", "--save_strategy", "steps"]
    argv = [f"--config={file}", *flags] if config_first else [*flags, f"--config={file}"]
    arguments, config = parse("train", argv)
    assert (arguments.model, arguments.data, arguments.flatten) == ("from-flag", "d", False)
    assert (config.learning_rate, config.save_strategy) == (1e-3, "steps")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modle: m", "no setting '--modle=m'; did you mean '--model'?"),
        ("3: 1", "no setting '--3=1': see"),
        ("model: [", "cannot be read as YAML"),
        ("- model", "it holds no 'name: value' lines"),
        ("hello", "it holds no 'name: value' lines"),
        ("model: m\ndata: d\nseed: many", "argument --seed: 'many' is not a whole number"),
        ("model: m\ndata: d\nflatten: perhaps", "argument --flatten: 'perhaps' is not true or false"),
        ("model: m\ndata: ~", "required: --data"),
        ("", "required: --model, --data"),
        ("model: " + "[" * 2000 + "]" * 2000, "cannot be read as YAML"),
        ("model: 2026-99-99", "cannot be read as YAML: month must be"),
        ("model: !!python/object/apply:os.system [touch ran]", "cannot be read as YAML"),
        ("seed: {a: 1}", "is not a whole number"),
        ("? [model]\n: m", "cannot be read as YAML"),
    ],
)
def test_bad_yaml(tmp_path, text, message):
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    with pytest.raises(ProConError) as caught:
        parse("train", ["--config", str(file)])
    assert message in str(caught.value)


TRAIN = ["train", "m", "d"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["eval", "m", "stray"], "no setting 'stray': see"),
        (["eval", "--model"], "argument --model: expected one argument; see 'procon eval --help'"),
        (["eval", "m", "--config"], "argument --config: expected one argument"),
        (["eval", "m", "--conf", "c.yaml"], "no setting '--conf'; did you mean '--config'"),
        (["eval", "m", "--batch_size", "x"], "batch_size is x: give 1 or more, or auto"),
        (["eval", "m", "--batch_size", "0"], "batch_size is 0: give 1 or more"),
        (["eval", "m", "--max_new_tokens", "0"], "max_new_tokens is 0: give 1 or more"),
        (["eval", "m", "--system-prompt", " "], "system_prompt is ' ': give a text that says something"),
        (["eval", "m", "--thinking-markers", "a,b,c"], "thinking_markers is ('a', 'b', 'c'): give what begins"),
        (["directions", "m", "--thinking-tokens", "0"], "thinking_tokens is 0: give 1 or more"),
        (["directions", "m", "--dtype", "int8"], "dtype is 'int8': choose one of auto, bfloat16"),
        ([*TRAIN, "--chat-template-kwargs", "off"], "'off' is not a JSON object, such as"),
        ([*TRAIN, "--device_map", "{"], "argument --device_map: '{' is not a JSON object"),
        ([*TRAIN, "--method", "full", "--load_in_8bit"], "quantised weights do not train: take --method lora"),
        ([*TRAIN, "--lora_dropout", "1"], "lora_dropout is 1.0: give less than 1"),
        ([*TRAIN, "--overlong", "keep"], "overlong is 'keep': choose one of cut, drop"),
        ([*TRAIN, "--procon_schedule", "-0.5"], "alpha is -0.5: give a finite number, 0 or more"),
        ([*TRAIN, "--procon_schedule", "sometimes"], "alpha schedule 'sometimes' is not understood: give"),
        ([*TRAIN, "--procon_blocks", "some"], "procon_blocks is 'some': give"),
        ([*TRAIN, "--save_strategy", "sometimes"], "see 'procon train --help'"),
        ([*TRAIN, "--learning_rate", "nan"], "learning_rate is nan: give 0 or more"),
        ([*TRAIN, "--max_steps", "9" * 400], "give less than 9223372036854775808"),
        ([*TRAIN, "--lr_scheduler_kwargs", "no"], "argument --lr_scheduler_kwargs: 'no' is not a JSON object"),
        ([*TRAIN, "--seed", "-1"], "seed is -1: give 0 or more"),
        ([*TRAIN, "--seed", "4294967296"], "seed is 4294967296: give less than 4294967296"),
        ([*TRAIN, "--gradient_accumulation_steps", "0"], "gradient_accumulation_steps is 0: give 1 or more"),
        (
            [*TRAIN, "--eval_data", "d", "--load_best_model_at_end", "--save_strategy", "no"],
            "requires the save and eval strategy to match",
        ),
    ],
)
def test_bad_settings(argv, message, capsys, monkeypatch):
    monkeypatch.setattr("procon.cli.train.load_model", lambda *_, **__: pytest.fail("a model was read"))
    assert main(argv) == 2
    line = capsys.readouterr().err
    assert line.startswith("procon: error: ")
    assert message in line
    assert line.count("\n") == 1
