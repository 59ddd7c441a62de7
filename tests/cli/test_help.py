"""``--help``: at once, in groups, and never other than what the commands take."""

import re
import resource
import subprocess
import sys
from dataclasses import fields

import pytest

from procon.cli import first_look, main
from procon.cli.help import groups_of, help_of
from procon.cli.parsing import full_parser
from procon.cli.registry import COMMANDS
from procon.data.conversations import DATA_SUFFIXES


def shown(name: str) -> dict:
    return {setting.name: setting for group in groups_of(COMMANDS[name]) for setting in group.settings}


@pytest.mark.parametrize("argv", [["train", "--help"], ["train", "-h"], ["help", "train"], ["help"], ["-V"]])
def test_it_comes_in_less_than_a_second_of_cpu(argv):
    script = (
        "import sys, time, procon.cli\n"
        f"code = procon.cli.main({argv})\n"
        "heavy = [name for name in ('torch', 'transformers', 'numpy', 'datasets') if name in sys.modules]\n"
        "print('loaded', heavy, code, time.process_time() < 1)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stderr == ""
    assert result.stdout.endswith("loaded [] 0 True\n")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["train"], "the following arguments are required: --model, --data; see 'procon train --help'"),
        (["train", "m", "d", "--modle", "x"], "there is no setting '--modle'; did you mean '--model'?"),
        (
            ["train", "m", "d", "--adam_epsilo", "x"],
            "there is no setting '--adam_epsilo'; did you mean '--adam_epsilon'",
        ),
        (["train", "m", "d", "--learning_rate=abc"], "argument --learning_rate/--learning-rate: invalid float value"),
        (["train", "m", "d", "--adam-beta1", "x"], "argument --adam_beta1/--adam-beta1: invalid float value: 'x'"),
        (["train", "m", "d", "--lora_r", "8.5"], "argument --lora_r/--lora-r: invalid int value: '8.5'"),
        (
            ["train", "m", "d", "--procon_scope", "reply"],
            "procon_scope is 'reply': choose one of response",
        ),
        (["train", "m", "none.jsonl"], "data file 'none.jsonl' does not exist: check the path"),
        (["train", "./m", "d"], "model './m' cannot be loaded (there is no such file or folder): give a folder"),
        (["train", "m", "--config", "none.yaml"], "config file 'none.yaml' does not exist: check the path"),
        (["eval", "m", "--malicious", "none.txt"], "prompt file 'none.txt' does not exist"),
        (["report", "none.json"], "run 'none.json' does not exist: give the path of a file or a folder that does"),
    ],
)
def test_what_is_wrong_is_said_in_less_than_a_second_of_cpu(argv, said, tmp_path):
    script = (
        "import sys; from procon.cli import main; code = main(sys.argv[1:])\n"
        "print(code, [name for name in ('torch', 'transformers', 'numpy', 'datasets') if name in sys.modules])"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = subprocess.run(
        [sys.executable, "-c", script, *argv], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert result.stderr.startswith(f"procon: error: {said}")
    assert result.stdout == "2 []\n"
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1


@pytest.mark.parametrize("name", COMMANDS)
def test_the_first_look_refuses_nothing_that_the_command_takes(name, tmp_path, monkeypatch):
    """Names and types of the installed TrainingArguments among them; and if these are not found in their source."""
    monkeypatch.chdir(tmp_path)
    command = COMMANDS[name]
    there = [f"--{setting.name}={tmp_path}" for setting in shown(name).values() if setting.required]
    there = ["--shell=bash"] if name == "completion" else there
    values = {int: "7", float: "0.5"}
    flags = []
    for action in full_parser(name)[0]._actions:
        setting = shown(name).get(action.dest)
        value = setting.choices[0] if setting and setting.choices else values.get(action.type, str(tmp_path))
        flags += [(flag, value) for flag in action.option_strings if flag not in ("-h", "--help")]
    assert not command.trains or len(flags) > 250
    for _ in range(2):
        for flag, value in flags:
            first_look.check(name, [*there, flag, value], files=True)
        monkeypatch.setattr(first_look, "_training_arguments", dict)
    for settings in (there, [*there, "--config", str(tmp_path)]):
        first_look.check(name, [*settings, "--learning_rate", "x", "--tomorrows"] if command.trains else settings)
    assert set(first_look.DATA_SUFFIXES) == set(DATA_SUFFIXES)


@pytest.mark.parametrize("name", COMMANDS)
def test_it_is_what_the_command_takes(name):
    """Names, defaults, what is required, and choices, against the parser that the command line goes through."""
    command = COMMANDS[name]
    real = {action.dest: action for action in full_parser(name)[0]._actions}
    listed = shown(name)
    own = {field.name for field in fields(command.arguments) if field.init}
    ours = own | {dest for dest in real if command.trains and dest.startswith("procon_")}
    assert ours <= listed.keys() <= real.keys()
    for setting in listed.values():
        action = real[setting.name]
        required = action.required
        assert setting.required == required, setting.name
        default = None if required else action.default
        if setting.kind == "SWITCH":
            assert bool(setting.default) == bool(default), setting.name
        else:
            assert setting.default == (tuple(default) if isinstance(default, list) else default), setting.name
        if setting.choices:
            assert action.metavar == "{" + ",".join(setting.choices) + "}" or action.choices == list(setting.choices)


@pytest.mark.parametrize("name", COMMANDS)
def test_each_flag_stands_there_once_and_says_what_it_is_for(name, capsys):
    assert main([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: procon {name} ")
    flags = re.findall(r"^  (?:-h, )?--(\w+)", text, flags=re.MULTILINE)
    assert sorted(flags) == sorted({*shown(name), "config", "help"})
    assert all(setting.text.strip() for setting in shown(name).values())
    assert "Names take dashes too" in " ".join(text.split())
    assert "None" not in text
    assert max(map(len, text.splitlines())) <= 110


def test_groups_of_training(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    text = help_of("train")
    titles = re.findall(r"^([a-z ,]+):$", text, flags=re.MULTILINE)
    assert titles == [
        *("model and data", "loading the model", "evaluation while training", "directions and safety data", "adapter"),
        *("constraint", "drift", "length and batches", "optimiser", "precision and memory"),
        *("saving and logging", "processes", "other"),
    ]
    words = " ".join(text.split())
    assert "usage: procon train MODEL DATA [settings]" in words
    assert re.search(r"--model MODEL [^-]*\(required\)", words)
    assert "--method {lora,full}" in words
    assert "--procon_penalty {squared,absolute,huber}" in words
    assert "--save_strategy {no,steps,epoch,best}" in words
    assert "(default: 0.0002)" in words
    assert "--adam_beta1" not in words


def test_help_of_no_command(capsys):
    assert main(["help", "trai"]) == 2
    assert "no command 'trai'; did you mean 'train'?" in capsys.readouterr().err
