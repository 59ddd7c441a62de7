"""``procon directions``, ``drift``, ``eval`` and ``report`` on a tiny model: what they write, and what they refuse."""

import io
import json
import re
import sys
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from procon.chat import ContrastPrompts
from procon.cli import commands, main
from procon.cli.arguments import EvalArguments
from procon.directions import Directions
from procon.evaluation import Evaluation

#: A progress bar, or a line of the command's own.
EXPECTED_LINE = re.compile(r".*\[\d\d:\d\d[<,].*(/s|s/\w+)\]|warning: .*|procon: error: .*|")


@pytest.fixture
def here(place, tiny_model) -> Path:
    """The current folder, with a model, an adapter of it, data and prompts."""
    get_peft_model(tiny_model(), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])).save_pretrained(
        "adapter"
    )
    file = Path("adapter/adapter_config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "model"}))
    Path("malicious.txt").write_text("Steal the car.\nForge it.\n")
    Path("benign.txt").write_text("Wash the big car.\nPaint it.\n")
    return place


PROMPTS = ["--malicious", "malicious.txt", "--benign", "benign.txt", "--dtype", "float32"]
EXTRACT = ["directions", "model", *PROMPTS]
EVAL = ["eval", "model", "--malicious", "malicious.txt"]


def assert_one_line(place: Path, argv: list[str], message: str, capsys) -> None:
    """The command ends in one line, and the folder is as it was."""

    def files() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in place.rglob("*")}

    before = files()
    code = main(argv)
    error = capsys.readouterr().err
    assert code == 2, error
    lines = re.split(r"[\r\n]+", error.removesuffix("\n"))
    assert [line for line in lines if not EXPECTED_LINE.fullmatch(line)] == []
    assert [line for line in lines if line.startswith("procon: error: ")] == lines[-1:]
    assert re.search(message, lines[-1]), lines[-1]
    assert files() == before


def test_directions_then_drift_then_eval_then_report(here, capsys):
    assert main([*EXTRACT, "--output", "new/d.safetensors", "--batch_size", "1"]) == 0
    printed = capsys.readouterr()
    assert "no direction" in printed.out
    assert "refuses 0% of malicious prompts" in printed.out
    assert "Written: new/d.safetensors\n" in printed.out
    assert "warning: the model refuses 0% of malicious prompts" in printed.err
    assert Directions.load("new/d.safetensors").usable.tolist() == [False, True, True]

    # A new adapter changes nothing; its folder has no tokenizer of its own.
    assert main(["drift", "model", "adapter", "--output", "new/drift.json", *PROMPTS]) == 0
    found = json.loads(Path("new/drift.json").read_text())
    assert found["cosine"][0] is None
    assert found["cosine"][1:] == pytest.approx([1, 1], abs=1e-6)
    assert found["malicious_shift"][1:] == pytest.approx([0, 0], abs=1e-6)

    short = ["--max_new_tokens", "2", "--task_max_new_tokens", "2"]
    assert main(["eval", "adapter", "--output", "new/eval.json", "--task", "data.jsonl", *short, *PROMPTS]) == 0
    found = Evaluation.load("new/eval.json")
    assert (found.refusal_malicious.total, found.refusal_benign.total, found.task.total) == (2, 2, 16)
    assert found.sources["malicious"] == {"set": "file", "source": "malicious.txt", "prompts": 2}

    # Of a folder that a training has left, the evaluation is where its report looks.
    assert not Path("adapter/eval.json").exists()
    Path("adapter/procon.json").write_text("{}")
    assert main(["eval", "adapter", *short, *PROMPTS]) == 0
    printed = capsys.readouterr().out
    assert "Mean cosine 1.000: 1 is no drift" in printed
    assert "Written: adapter/eval.json\n" in printed
    assert Evaluation.load("adapter/eval.json").refusal_malicious.total == 2

    assert (
        main(["report", "new/eval.json", "new/eval.json", "--output", "new/[red].html", "--title", "Two <runs>"]) == 0
    )
    assert "Written: new/[red].html\n" in capsys.readouterr().out  # a path that looks like markup
    assert "Two &lt;runs&gt;" in Path("new/[red].html").read_text()


def test_a_file_goes_before_a_set(here, monkeypatch):
    found = ContrastPrompts(("count to two", "count to one"), ("count",)), {"malicious": {"set": "harmbench"}}
    monkeypatch.setattr(commands, "load_prompt_sets", lambda names, *, most: found)
    arguments = EvalArguments(model="m", prompts="harmbench", benign="benign.txt")
    prompts, sources = commands._evaluation_prompts(arguments)
    assert prompts == ContrastPrompts(("count to two", "count to one"), ("Wash the big car.", "Paint it."))
    assert (sources["malicious"]["set"], sources["benign"]["set"]) == ("harmbench", "file")


def test_task_rows_are_first_question_and_last_answer(here):
    turns = ["system", "user", "assistant", "user", "assistant", "user"]
    rows = [{"messages": [{"role": role, "content": f"{role} {number}"} for number, role in enumerate(turns)]}]
    Path("task.json").write_text(json.dumps(rows))
    assert commands._task("task.json") == [{"instruction": "user 1", "output": "assistant 4"}]


def without_template(tokenizer) -> None:
    tokenizer.chat_template = None
    tokenizer.save_pretrained("model")
    Path("model/chat_template.jinja").unlink(missing_ok=True)


def not_finite(_) -> None:
    weights = load_file("model/model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"].fill_(float("nan"))
    save_file(weights, "model/model.safetensors", {"format": "pt"})


def write(name: str, content: str | bytes):
    return lambda _: Path(name).write_bytes(content.encode() if isinstance(content, str) else content)


def nothing(_) -> None:
    """All is well but the flags."""


@pytest.mark.parametrize(
    ("prepare", "argv", "message"),
    [
        (nothing, [*EVAL, "--output", "model"], "cannot write 'model': it is a folder"),
        (nothing, [*EVAL, "--output", "data.jsonl/e.json"], "cannot write 'data.jsonl/e.json'"),
        (nothing, [*EXTRACT, "--output", "/proc/none/d"], "./proc/"),
        (nothing, [*EXTRACT, "--k", "9"], "k is 9: give 1 to"),
        (nothing, [*EVAL, "--judge", "gpt"], "there is no judge 'gpt'"),
        (nothing, [*EVAL, "--task_metric", "bleu"], "there is no task metric 'bleu'"),
        (nothing, [*EVAL, "--prompts", "harm"], "there is no prompt set 'harm'"),
        (nothing, [*EVAL, "--load_in_4bit", "--load_in_8bit"], "load_in_4bit and load_in_8bit are both"),
        (nothing, [*EVAL, "--attn_implementation", "flash"], "model 'model' cannot be loaded"),
        (
            write("t.jsonl", '{"messages": [{"role": "user", "content": "a"}]}'),
            [*EVAL, "--task", "t.jsonl"],
            "task 't.jsonl', row 1: give it a user turn and an assistant turn",
        ),
        (write("malicious.txt", "\n"), EXTRACT, "prompt file 'malicious.txt' holds no prompts"),
        (write("model/config.json", "{"), EXTRACT, "model 'model' cannot be loaded"),
        (write("model/model.safetensors", b"\x08\0"), EXTRACT, "model 'model' cannot be loaded"),
        (without_template, EXTRACT, "'model' has no chat template: set tokenizer.chat_template"),
        (without_template, EVAL, "'model' has no chat template"),
        (not_finite, EXTRACT, "hidden states entering block 1 are NaN or infinite: load the model in"),
    ],
)
def test_what_is_wrong_is_one_line(here, capsys, tokenizer, prepare, argv, message):
    prepare(tokenizer)
    assert_one_line(here, argv, message, capsys)


def test_models_that_cannot_be_compared(here, capsys, tiny_model, tokenizer):
    tiny_model(num_hidden_layers=2).save_pretrained("other")
    tokenizer.save_pretrained("other")
    argv = ["drift", "model", "other", "--output", "drift.json", *PROMPTS]
    assert_one_line(here, argv, r"shape \(3, 32\) and \(2, 32\) cannot be compared", capsys)


def test_what_the_system_refuses_is_one_line(here, capsys, monkeypatch):
    def refuse(*_, **__):
        raise OSError(28, "No space left on device", "somewhere")

    monkeypatch.setattr(commands, "evaluate", refuse)
    assert_one_line(here, EVAL, "'somewhere' cannot be read or written .No space left", capsys)


def test_a_model_with_code_is_not_asked_about(here, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    config = json.loads(Path("model/config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
    Path("model/config.json").write_text(json.dumps(config))
    Path("model/code.py").write_text("open('ran', 'w')")
    for argv in (EVAL, EXTRACT, ["train", "model", "data.jsonl"], ["drift", "model", "model"]):
        assert_one_line(here, argv, "'model'.* code.*--trust_remote_code", capsys)
    asked = []
    monkeypatch.setattr(commands, "load_model", lambda *_, **settings: asked.append(settings) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["eval", "model", "--trust-remote-code"])
    assert asked[0]["trust_remote_code"] is True
