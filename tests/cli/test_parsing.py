"""The command line: quick help, settings from flags and YAML, and bad input: one line that leaves nothing behind."""

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from procon.cli import main
from procon.cli.chat import chat_settings
from procon.cli.parsing import parse
from procon.cli.registry import COMMANDS
from procon.data import parse_columns
from procon.directions import Directions
from procon.errors import ProConError
from procon.evaluation import Evaluation
from procon.method.record import write_record
from procon.models import load_model
from procon.schedule import AlphaSchedule
from procon.settings import ChatSettings
from procon.version import __version__

#: A progress bar, or a line of the command's own.
EXPECTED_LINE = re.compile(r".*\[\d\d:\d\d[<,].*(/s|s/\w+)\]|\w+: (warning|error): .*|")


@pytest.fixture
def place(tiny_model, tokenizer, tmp_path, tmp_path_factory, monkeypatch) -> Path:
    """The current folder, with models, data, directions and prompts in it, good and bad ones."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
    monkeypatch.chdir(tmp_path)
    model = tiny_model()
    model.save_pretrained("model")
    tokenizer.save_pretrained("model")
    get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])).save_pretrained("adapter")
    adapter = json.loads(Path("adapter/adapter_config.json").read_text())
    Path("adapter/adapter_config.json").write_text(json.dumps(adapter | {"base_model_name_or_path": "model"}))

    Path("data.jsonl").write_text('{"prompt": "Two and two?", "completion": "Four."}\n' * 4)
    Path("malicious.txt").write_text("Steal the car.\nForge it.\n")
    Path("benign.txt").write_text("Wash the big car.\nPaint it.\n")
    directions(3, 32).save("directions.safetensors")
    return tmp_path


def directions(blocks: int, width: int) -> Directions:
    ones = torch.ones(blocks)
    return Directions(torch.nn.functional.normalize(torch.ones(blocks, width))[:, None], ones[:, None])


PROMPT_FILES = ["--malicious", "malicious.txt", "--benign", "benign.txt"]
TRAIN = ["train", "--model", "model", "--data", "data.jsonl", "--directions", "directions.safetensors"]


@pytest.mark.parametrize("argv", [["--help"], ["--version"], []])
def test_help_and_version_come_without_torch(argv):
    script = (
        "import sys, procon.cli\n"
        f"code = procon.cli.parsing.main({argv})\n"
        "heavy = [name for name in ('torch', 'transformers', 'datasets') if name in sys.modules]\n"
        "print('loaded', heavy, code)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stderr == ""
    assert result.stdout.endswith("loaded [] 0\n")
    if argv == ["--version"]:
        assert result.stdout.startswith(f"procon {__version__}\n")
    else:
        assert all(f"\n  {name} " in result.stdout for name in COMMANDS)


@pytest.mark.parametrize(
    ("argv", "found"),
    [
        (["eval", "m"], {"model": "m"}),
        (["eval", "m", "--batch_size", "2"], {"model": "m", "batch_size": "2"}),
        (["drift", "a", "b"], {"start": "a", "tuned": "b"}),
        (["drift", "a", "--tuned", "b"], {"start": "a", "tuned": "b"}),
        (["train", "m", "d.jsonl"], {"model": "m", "data": "d.jsonl"}),
        (["quickstart", "--model", "m"], {"model": "m"}),
    ],
)
def test_words_before_the_first_flag(argv, found):
    parsed = parse(argv[0], argv[1:])[0]
    assert {name: getattr(parsed, name) for name in found} == found


def test_an_interrupt_of_training_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    from procon.cli import train

    def interrupted(*_):
        with train._resumable(tmp_path):
            raise KeyboardInterrupt

    monkeypatch.setattr(train, "train", interrupted)
    assert main(["train", "m", "d"]) == 130
    assert capsys.readouterr().err == "procon: interrupted\n"
    (tmp_path / "checkpoint-5").mkdir()
    write_record(tmp_path / "checkpoint-5", {"complete": True, "files": {}})
    assert main(["train", "m", "d"]) == 130
    goes_on = "the same command with --resume goes on from the last checkpoint"
    assert capsys.readouterr().err == f"procon: interrupted: {goes_on}\n"


def test_defaults_of_training():
    arguments, config = parse("train", ["--model", "m", "--data", "d"])
    assert (arguments.model, arguments.data, arguments.method, arguments.resume) == ("m", "d", "lora", False)
    assert (config.learning_rate, config.output_dir, config.report_to) == (2e-4, "procon-output", [])
    assert (config.procon_schedule, config.procon_scope, config.procon_penalty) == ("procon_s", "all", "absolute")


YAML = """
model: from-yaml          # a comment
data: d.jsonl
flatten: yes
lora_targets: [q_proj, v_proj]
learning-rate: 3e-4
max_length: 99
save_strategy: no
save_only_model: true
procon_schedule: 0.5
procon_blocks: [1, 2]
directions: ~
adam_beta1: 0.8
label_names: [labels]
lr_scheduler_kwargs: {num_cycles: 2}
chat_template_kwargs: {enable_thinking: true, reasoning_effort: low}
system_prompt: Be kind.
data_columns: [prompt=Q, response=A]
seed: 5
"""


def test_yaml_settings_are_read_as_flags_are(tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text(YAML)
    arguments, config = parse("train", ["--config", str(file)])
    assert (arguments.model, arguments.data, arguments.flatten, arguments.max_length) == (
        "from-yaml",
        "d.jsonl",
        True,
        99,
    )
    assert arguments.lora_targets == "q_proj,v_proj"
    assert arguments.directions is None
    assert (config.learning_rate, config.seed, config.adam_beta1) == (3e-4, 5, 0.8)
    assert (config.save_strategy, config.save_only_model) == ("no", True)
    assert AlphaSchedule.parse(config.procon_schedule).phases[0].alpha == 0.5
    assert config.procon_settings().blocks == (1, 2)
    assert config.label_names == ["labels"]
    assert config.lr_scheduler_kwargs == {"num_cycles": 2}
    expected = ChatSettings("Be kind.", {"enable_thinking": True, "reasoning_effort": "low"})
    assert chat_settings(arguments) == expected
    assert parse_columns(arguments.data_columns) == {"prompt": "Q", "response": "A"}


@pytest.mark.parametrize("config_first", [True, False])
def test_flags_win_over_yaml(tmp_path, config_first):
    file = tmp_path / "settings.yaml"
    file.write_text(YAML)
    flags = ["--model", "from-flag", "--learning-rate", "1e-3", "--flatten", "false", "--save_strategy", "steps"]
    config_flag = [f"--config={file}"]
    argv = config_flag + flags if config_first else flags + config_flag
    arguments, config = parse("train", argv)
    assert (arguments.model, arguments.data, arguments.flatten) == ("from-flag", "d.jsonl", False)
    assert (config.learning_rate, config.seed, config.save_strategy) == (1e-3, 5, "steps")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modle: m", "unknown setting 'modle'; did you mean 'model'?"),
        ("xyzzy: 1", "unknown setting 'xyzzy': see --help"),
        ("3: 1", "unknown setting '3': see --help"),
        ("config: other.yaml", "unknown setting 'config'"),
        ("model: [", "cannot be read as YAML"),
        ("- model", "holds no 'name: value' lines"),
        ("hello", "holds no 'name: value' lines"),
        ("model: m\ndata: d\nseed: many", "argument --seed: invalid int value: 'many'"),
        ("model: m\ndata: d\nflatten: perhaps", "argument --flatten"),
        ("model: m\ndata: ~", "required: --data"),
        ("", "required: --model, --data"),
        ("seed: 1\nmodel: m\nseed: 2", "'seed' is given twice"),
        ("max-length: 1\nmodel: m\nmax_length: 2", "'max_length' is given twice"),
        ("lr_scheduler_kwargs: {a: 1, a: 2}", "'a' is given twice"),
        ("model: " + "[" * 2000 + "]" * 2000, "cannot be read as YAML"),
        ("seed: " + "9" * 5000, "cannot be read as YAML"),
        ("model: 2026-99-99", "cannot be read as YAML: month must be"),
        ("model: !!python/object/apply:os.system [touch ran]", "cannot be read as YAML"),
        ("model: \x07", "cannot be read as YAML"),
        ("label_names: &a [a]\nlora_targets: *a", "aliases are not read"),
        ("seed: {a: 1}", "gives seed a dict: give one value"),
        ("lora_targets: [[a]]", "gives lora_targets a list: give one value"),
        ("? [model]\n: m", "cannot be read as YAML"),
    ],
)
def test_bad_yaml(tmp_path, text, message):
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    with pytest.raises(ProConError) as caught:
        parse("train", ["--config", str(file)])
    assert message in str(caught.value)


@pytest.mark.parametrize("argv", [["--config"], ["--config", "none.yaml"], ["--config", "."]])
def test_no_yaml(tmp_path, monkeypatch, argv):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ProConError, match=r"expected one argument|does not exist|cannot be read"):
        parse("train", argv)


def files(place: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in place.rglob("*")}


def assert_one_line(place: Path, argv: list[str], message: str, capsys) -> None:
    before = files(place)
    code = main(argv)
    error = capsys.readouterr().err
    assert code == 2, error
    lines = re.split(r"[\r\n]+", error.removesuffix("\n"))
    assert [line for line in lines if not EXPECTED_LINE.fullmatch(line)] == []
    assert [line for line in lines if line.startswith("procon: error: ")] == lines[-1:]
    assert re.search(message, lines[-1]), lines[-1]
    assert files(place) == before


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["tain"], "no command 'tain'; did you mean 'train'?"),
        (["xyzzy"], "no command 'xyzzy': choose one of quickstart, directions, train"),
        (["eval", "--modle", "x"], "no setting '--modle'; did you mean '--model'?"),
        (["train", "--data", "d", "--modell=x"], "no setting '--modell=x'; did you mean '--model'"),
        (["eval", "a", "b"], r"'b' is one word too many: write procon eval MODEL \[settings\]"),
        (["eval", "a", "--model", "b"], "model is given twice, as 'a' and by --model"),
        (["train"], "required: --model, --data; see 'procon train --help'"),
        (["eval", "--model"], "argument --model: expected one argument; see 'procon eval --help'"),
        (["eval", "--model", "model", "--bathc-size", "4"], "no setting '--bathc-size'; did you mean '--batch_size'"),
        (["eval", "--model", "model", "--conf", "c.yaml"], "no setting '--conf'"),
        (["eval", "--model", "model", "stray"], "no setting 'stray': see --help"),
        (["eval", "--model", "model", "--batch_size", "x"], "batch_size is x: give 1 or more, or auto"),
        (["eval", "--model", "model", "--batch_size", "0"], "batch_size is 0: give 1 or more"),
        (["eval", "--model", "model", "--max_new_tokens", "0"], "max_new_tokens is 0: give 1 or more"),
        (["eval", "--model", "model", "--output", "model"], "output 'model' is a folder: give a file"),
        (["eval", "--model", "model", "--task", "none.csv"], "data file 'none.csv' does not exist"),
        (["eval", "--model", "./none"], r"model './none' cannot be loaded \(.*\): give a folder or a hub name"),
        (["directions", "--model", "model", "--dtype", "int8"], "dtype is 'int8': choose one of auto, bfloat16"),
        (["directions", "--model", "model", "--malicious", "none.txt"], "prompt file 'none.txt' does not exist"),
        (["directions", "--model", "model", "--benign", "data.csv"], "prompt file 'data.csv' does not exist"),
        (["drift", "--start", "model", "--tuned", "./none", *PROMPT_FILES], "model './none' cannot be loaded"),
        ([*TRAIN, "--model", "./none"], "model './none' cannot be loaded"),
        ([*TRAIN, "--data", "none.jsonl"], "data file 'none.jsonl' does not exist"),
        ([*TRAIN, "--safety_data", "none.jsonl"], "data file 'none.jsonl' does not exist"),
        ([*TRAIN, "--safety_samples", "-1"], "safety_samples is -1: give 0 or more"),
        ([*TRAIN, "--directions", "none.safetensors"], "'none.safetensors' does not exist: make it with"),
        ([*TRAIN, "--method", "qlora"], "method is 'qlora': choose one of lora, full"),
        ([*TRAIN, "--method", "full", "--model", "adapter"], "'adapter' is a LoRA folder: merge it"),
        ([*TRAIN, "--dtype", "fp16"], "dtype is 'fp16': choose one of"),
        ([*TRAIN, "--lora_targets", "nope"], "lora_targets 'nope' do not fit the model .*: try all-linear"),
        ([*TRAIN, "--lora_r", "0"], "lora_r is 0: give 1 or more"),
        ([*TRAIN, "--max_length", "5"], "none of the 4 samples has a response token .*raise max_length"),
        ([*TRAIN, "--max_length", "0"], "max_length is 0"),
        ([*TRAIN, "--max_length", "20", "--overlong", "drop"], "none of the 4 samples has a response token"),
        ([*TRAIN, "--overlong", "keep"], "overlong is 'keep': choose one of cut, drop"),
        ([*TRAIN, "--data_config", "main"], "data 'data.jsonl' is a file: leave out data_config"),
        ([*TRAIN, "--data_columns", "prompt"], "data_columns is 'prompt': give prompt=NAME"),
        ([*TRAIN, "--data_columns", "prompt=q,response=a"], "data 'data.jsonl', row 1 is no conversation .no 'q'."),
        ([*TRAIN, "--chat-template-kwargs", "off"], "chat_template_kwargs is 'off': give a JSON object"),
        (
            [*TRAIN, "--chat-template-kwargs", '{"thinks": 0}'],
            "chat_template_kwargs has 'thinks', which the chat template",
        ),
        (
            ["eval", "--model", "none/none", "--system-prompt", " "],
            "system_prompt is ' ': give a text that says something",
        ),
        (["eval", "--model", "none/none", "--thinking-markers", "a,b,c"], "thinking_markers is .*: give what begins"),
        (["directions", "--model", "none/none", "--thinking-tokens", "0"], "thinking_tokens is 0: give a whole number"),
        ([*TRAIN, "--procon_schedule", "-0.5"], "alpha is -0.5: give a finite number, 0 or more"),
        ([*TRAIN, "--procon_schedule", "procon_s:-1"], "alpha is -1"),
        ([*TRAIN, "--procon_schedule", "sometimes"], "alpha schedule 'sometimes' is not understood: give"),
        ([*TRAIN, "--procon_scope", "reply"], "procon_scope is 'reply': choose one of"),
        ([*TRAIN, "--procon_blocks", "some"], "procon_blocks is 'some': give all"),
        ([*TRAIN, "--save_strategy", "sometimes"], "save.strategy.*see 'procon train --help'"),
        ([*TRAIN, "--learning_rate", "nan"], "learning_rate is nan: give a finite number"),
        ([*TRAIN, "--max_steps", "9" * 400], "max_steps is 9+: give a finite number"),
        ([*TRAIN, "--lr_scheduler_kwargs", "[]"], "lr_scheduler_kwargs is .*: give a mapping"),
        ([*TRAIN, "--seed", "-1"], "seed is -1: give 0 or more"),
        ([*TRAIN, "--seed", "4294967296"], "seed is 4294967296: give less than 4294967296"),
        ([*TRAIN, "--gradient_accumulation_steps", "0"], "gradient_accumulation_steps is 0: give 1 or more"),
        (
            [*TRAIN, "--report_to", "nope"],
            "report_to is 'nope', which is not installed or not known: choose among",
        ),
        ([*TRAIN, "--output_dir", "data.jsonl"], "cannot write 'data.jsonl/any' "),
        ([*TRAIN, "--output_dir", "/proc/none"], "cannot write '/proc/none/any'"),
        ([*TRAIN, "--procon_anchors_dir", "data.jsonl"], "cannot write 'data.jsonl/any' "),
        (["eval", "--model", "none/none", "--output", "data.jsonl/e.json"], "cannot write 'data.jsonl/e.json'"),
        (["directions", "--model", "none/none", "--output", "/proc/none/d"], "cannot write '/proc/none/d'"),
        (["quickstart", "--model", "none/none", "--output_dir", "data.jsonl"], "cannot write 'data.jsonl/report.html'"),
        (["eval", "--model", "\x1b[2J./none"], r"model '\\x1b\[2J./none' cannot be loaded"),
        ([*TRAIN, "--resume"], "no complete checkpoint in 'procon-output' to resume from: leave --resume out"),
    ],
)
def test_bad_settings(place, capsys, argv, message):
    assert_one_line(place, argv, message, capsys)


def without_template(tokenizer) -> None:
    tokenizer.chat_template = None
    tokenizer.save_pretrained("model")
    Path("model/chat_template.jinja").unlink(missing_ok=True)


def not_finite(tokenizer) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file("model/model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"].fill_(torch.nan)
    save_file(weights, "model/model.safetensors", {"format": "pt"})


def checkpoint(_) -> None:
    folder = Path("procon-output/checkpoint-5")
    folder.mkdir(parents=True)
    write_record(folder, {"files": {}})


def write(name: str, content: str | bytes):
    return lambda _: Path(name).write_bytes(content.encode() if isinstance(content, str) else content)


EXTRACT = ["directions", "--model", "model", *PROMPT_FILES]


@pytest.mark.parametrize(
    ("prepare", "argv", "message"),
    [
        (write("data.jsonl", ""), TRAIN, "data 'data.jsonl' cannot be read .* no data"),
        (write("data.jsonl", '{"prompt": "a", '), TRAIN, "data 'data.jsonl' cannot be read .row 1: "),
        (write("data.jsonl", '{"query": "a"}'), TRAIN, r"row 1 is no conversation .*\['query'\]"),
        (
            write("data.jsonl", '{"prompt": "a", "completion": 1}'),
            TRAIN,
            "row 1 is no conversation .a role or a content is no text.",
        ),
        (
            write("t.jsonl", '{"messages": [{"role": "user", "content": "a"}]}'),
            ["eval", "--model", "model", "--task", "t.jsonl"],
            "task 't.jsonl', row 1: give it a user turn and an assistant turn",
        ),
        (write("malicious.txt", "\n"), EXTRACT, "prompt file 'malicious.txt' holds no prompts"),
        (write("model/config.json", "{"), EXTRACT, "model 'model' cannot be loaded"),
        (write("model/model.safetensors", b"\x08\0"), EXTRACT, "model 'model' cannot be loaded"),
        (write("directions.safetensors", b"\x08\0"), TRAIN, "is damaged or not one of ProCon's .*: extract it again"),
        (lambda _: directions(3, 64).save("directions.safetensors"), TRAIN, "of width 64, but the model has 3 blocks"),
        (lambda _: directions(4, 32).save("directions.safetensors"), TRAIN, "for 4 blocks of width 32, but the model"),
        (without_template, EXTRACT, "'model' has no chat template: set tokenizer.chat_template"),
        (without_template, TRAIN, "'model' has no chat template: set tokenizer.chat_template"),
        (without_template, ["eval", "--model", "model"], "'model' has no chat template"),
        (not_finite, EXTRACT, "hidden states entering block 1 are NaN or infinite: load the model in"),
        (checkpoint, TRAIN, "'procon-output' holds checkpoints: pass --resume, or another --output_dir"),
    ],
)
def test_bad_files(place, capsys, tokenizer, prepare, argv, message):
    prepare(tokenizer)
    assert_one_line(place, argv, message, capsys)


def test_paths_that_look_like_markup(place, capsys):
    """They are printed as they are, after the work that they are for."""
    for name in ("out[/x].safetensors", "[red]d.safetensors"):
        assert main([*EXTRACT, "--output", name, "--dtype", "float32"]) == 0
        assert f"Written: {name}\n" in capsys.readouterr().out
        assert Path(name).is_file()


def test_what_the_system_refuses_is_one_line(place, capsys, monkeypatch):
    def refuse(*_, **__):
        raise OSError(28, "No space left on device", "somewhere")

    monkeypatch.setattr("procon.cli.commands.evaluate", refuse)
    assert_one_line(place, ["eval", "--model", "model"], "'somewhere' cannot be read or written .No space left", capsys)


def test_drift_that_cannot_be_written_leaves_the_old_file(place, monkeypatch):
    from procon.cli.commands import _write_drift
    from procon.evaluation import Drift

    drift = Drift(*(torch.tensor([torch.nan, 0.5]) for _ in range(3)))
    _write_drift(drift, Path("d.json"), {})
    before = Path("d.json").read_bytes()
    write = Path.write_bytes

    def half(path: Path, data: bytes) -> int:
        write(path, data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(ProConError, match=r"cannot write 'd.json' \(No space left on device\)"):
        _write_drift(drift, Path("d.json"), {})
    assert Path("d.json").read_bytes() == before


def test_a_model_with_code_is_not_asked_about(place, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    config = json.loads(Path("model/config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
    Path("model/config.json").write_text(json.dumps(config))
    Path("model/code.py").write_text("open('ran', 'w')")
    for argv in (["eval", "--model", "model"], EXTRACT, TRAIN, ["drift", "--start", "model", "--tuned", "model"]):
        assert_one_line(place, argv, "'model' comes with code of its own, .*--trust_remote_code", capsys)
    asked = []
    monkeypatch.setattr("procon.cli.commands.load_model", lambda *_, **settings: asked.append(settings) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["eval", "--model", "model", "--trust-remote-code"])
    assert asked[0]["trust_remote_code"] is True


def test_models_that_cannot_be_compared(place, capsys, tiny_model, tokenizer):
    tiny_model(num_hidden_layers=2).save_pretrained("other")
    tokenizer.save_pretrained("other")
    argv = ["drift", "--start", "model", "--tuned", "other", "--output", "drift.json", *PROMPT_FILES]
    assert_one_line(place, argv, r"shape \(3, 32\) and \(2, 32\) cannot be compared", capsys)


def test_directions_then_drift_then_eval(place, capsys):
    assert main([*EXTRACT, "--output", "new/d.safetensors", "--dtype", "float32", "--batch_size", "1"]) == 0
    printed = capsys.readouterr()
    assert "no direction" in printed.out
    assert "refuses 0% of malicious prompts" in printed.out
    assert "procon: warning: the model refuses 0% of malicious prompts" in printed.err
    assert Directions.load("new/d.safetensors").usable.tolist() == [False, True, True, True]

    # A new adapter changes nothing; its folder has no tokenizer of its own.
    argv = ["drift", "--start", "model", "--tuned", "adapter", "--output", "new/drift.json", "--dtype", "float32"]
    assert main([*argv, *PROMPT_FILES]) == 0
    found = json.loads(Path("new/drift.json").read_text())
    assert found["cosine"][0] is None
    assert found["cosine"][1:] == pytest.approx([1, 1], abs=1e-6)
    assert found["malicious_shift"][1:] == pytest.approx([0, 0], abs=1e-6)

    argv = ["eval", "--model", "adapter", "--output", "new/eval.json", "--task", "data.jsonl", "--dtype", "float32"]
    assert main([*argv, "--max_new_tokens", "2", "--task_max_new_tokens", "2", *PROMPT_FILES]) == 0
    evaluation = Evaluation.load("new/eval.json")
    assert (evaluation.refusal_malicious.total, evaluation.refusal_benign.total, evaluation.task.total) == (2, 2, 4)


def test_train_then_resume(place, capsys):
    argv = [*TRAIN, "--output_dir", "out", "--lora_targets", "q_proj, o_proj", "--dtype", "float32", "--flatten"]
    argv += ["--procon_schedule", "0.5@1steps,0", "--logging_steps", "1", "--save_steps", "2", "--use_cpu"]
    argv += ["--per_device_train_batch_size", "2", "--drift_steps", "0", "--safety_samples", "3"]
    assert main([*argv, "--max_steps", "2"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "Written: out. Measure it: procon eval --model out" in printed
    assert sorted(json.loads(Path("out/adapter_config.json").read_text())["target_modules"]) == ["o_proj", "q_proj"]
    assert Path("out/tokenizer_config.json").is_file()
    logs = json.loads(Path("out/trainer_state.json").read_text())["log_history"]
    assert [log["procon/alpha"] for log in logs if "loss" in log] == [0.5, 0]

    assert_one_line(place, [*argv, "--max_steps", "4"], "'out' holds checkpoints: pass --resume", capsys)
    assert main([*argv, "--max_steps", "4", "--resume"]) == 0
    assert json.loads(Path("out/trainer_state.json").read_text())["global_step"] == 4
    card = Path("out/README.md").read_text()
    assert card.count("## Refusal anchored with ProCon") == 1
    assert "| strength (alpha) | `0.5@1steps,0` |" in card
    assert Directions.load("out").hash == Directions.load("directions.safetensors").hash


def test_train_extracts_directions_where_none_are_given(place, capsys):
    argv = ["train", "--model", "model", "--data", "data.jsonl", "--output_dir", "out", "--max_steps", "1"]
    assert main([*argv, "--procon_schedule", "procon_s", "--dtype", "float32", "--use_cpu", "--drift_steps", "1"]) == 0
    assert "procon: warning: the model refuses 0% of malicious prompts" in capsys.readouterr().err
    found = Directions.load("out")
    assert found.usable.tolist() == [False, True, True, True]
    assert found.provenance["counts"] == {"positive": 192, "negative": 192}
    start = Directions.extract(
        *load_model("model", dtype=torch.float32), check_refusal=False, progress=False, batch_size=7
    )
    assert found.cosine(start)[1:].tolist() == pytest.approx([1, 1], abs=1e-4)  # of the model before training
    logs = json.loads(Path("out/trainer_state.json").read_text())["log_history"]
    assert any("procon/drift_cos" in log for log in logs)


def test_task_rows_are_first_question_and_last_answer(place):
    from procon.cli.commands import _task

    turns = ["system", "user", "assistant", "user", "assistant", "user"]
    rows = [{"messages": [{"role": role, "content": f"{role} {number}"} for number, role in enumerate(turns)]}]
    Path("task.json").write_text(json.dumps(rows))
    assert _task("task.json") == [{"instruction": "user 1", "output": "assistant 4"}]


def test_logs_move_no_cursor(place, caplog, monkeypatch):
    """Such as those that name what a model's files say; afterwards, records are as before."""
    import logging

    logger = logging.getLogger("of.a.library")
    monkeypatch.setattr(
        "procon.cli.commands.load_model", lambda *_, **__: logger.warning("a %s\nb", "\x1b[2J") or 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        main(["eval", "--model", "model"])
    logger.warning("\x07%d", 3)
    assert [record.getMessage() for record in caplog.records if record.name == logger.name] == [
        "a \\x1b[2J\nb",
        "\x073",
    ]


def test_warnings_of_the_process_are_shown_as_before(capsys):
    import warnings

    before = warnings.showwarning
    main(["--version"])
    assert warnings.showwarning is before


def test_an_adapter_trained_further_trains_all_that_it_has(place):
    """Not its LoRA alone: what it keeps in full beside it, too."""
    settings = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    model, _ = load_model("model", dtype=torch.float32)
    get_peft_model(model, LoraConfig(**settings)).save_pretrained("with-head")
    config = json.loads(Path("with-head/adapter_config.json").read_text())
    Path("with-head/adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "model"}))
    argv = [*TRAIN, "--model", "with-head", "--max_steps", "1", "--output_dir", "out", "--drift_steps", "0"]
    assert main([*argv, "--dtype", "float32", "--flatten", "true", "--attn_implementation", "eager"]) == 0
    before, after = (load_file(f"{folder}/adapter_model.safetensors") for folder in ("with-head", "out"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("lora_B" in name for name in changed)
    assert any("lm_head" in name for name in changed)
