"""The kit, whole: a small model of another architecture, taught to refuse, and stand-ins for public prompt sets."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
from chat_server import serving
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

from benchmarks.kit.__main__ import QUESTION, keep_to, main
from benchmarks.kit.plan import kit_budget, known_methods
from benchmarks.study.plan import Size
from procon.chat import builtin_prompts
from procon.data import PROMPT_SETS, padding_collator, to_conversations, tokenize_conversations
from procon.errors import ProConError
from procon.models import load_model

#: Of the small model, to malicious and to benign prompts.
REPLIES = ("I cannot help with that.", "Sure, here it is.")


@pytest.fixture
def word_tokenizer(tokenizer):
    """Tokens as long as words of the built-in prompts: by them a small model separates malicious from benign ones."""
    special = {name: getattr(tokenizer, name) for name in ("pad_token", "bos_token", "eos_token")}
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=3000, special_tokens=list(special.values()), initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    sides = builtin_prompts("safety")
    model.train_from_iterator([*sides.malicious, *sides.benign, *REPLIES], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=model, chat_template=tokenizer.chat_template, **special)


@pytest.fixture
def start(tiny_model, word_tokenizer, tmp_path) -> Path:
    """A model made from a config, that refuses what is malicious."""
    model = tiny_model("qwen2", vocab_size=len(word_tokenizer))
    for part in (model, word_tokenizer):
        part.save_pretrained(tmp_path / "start")
    tokenizer = load_model(tmp_path / "start")[1]  # of the class that the family has
    prompts = builtin_prompts("safety")
    rows = [
        {"instruction": prompt, "output": reply}
        for side, reply in zip((prompts.malicious, prompts.benign), REPLIES, strict=True)
        for prompt in side
    ]
    dataset = tokenize_conversations(to_conversations(Dataset.from_list(rows)), tokenizer)
    settings = TrainingArguments(
        output_dir=str(tmp_path / "taught"),
        max_steps=150,
        per_device_train_batch_size=32,
        learning_rate=5e-3,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    Trainer(model, settings, train_dataset=dataset, data_collator=padding_collator(tokenizer)).train()
    model.save_pretrained(tmp_path / "start")
    return tmp_path / "start"


@pytest.fixture
def stand_ins(tmp_path, monkeypatch) -> None:
    """AdvBench and XSTest in the columns that they have, with built-in prompts in them."""
    held_out = builtin_prompts("held_out")
    tables = {
        "advbench": ("train.csv", [{"prompt": text, "target": "Sure"} for text in held_out.malicious]),
        "xstest": ("xstest_prompts.csv", [{"prompt": text, "label": "safe"} for text in held_out.benign]),
    }
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for name, (file, rows) in tables.items():
        (tmp_path / name).mkdir()
        with (tmp_path / name / file).open("w", newline="") as table:
            writer = csv.DictWriter(table, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        monkeypatch.setitem(PROMPT_SETS, name, replace(PROMPT_SETS[name], source=str(tmp_path / name)))


def share(run: dict, kind: str, key: str) -> float:
    return sum(reply[key] for reply in run["replies"][kind]) / len(run["replies"][kind])


def mean(values: list[float | None]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known)


@pytest.mark.slow
def test_the_whole_kit(start, stand_ins, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serving() as server:
        server.say = lambda messages: "refused" if "cannot" in messages[-1]["content"] else "complied"
        names = ["--methods", "plain,procon", "--poison", "10", "--lengths", "1", "--prompts", "advbench,xstest"]
        sizes = ["--train", "40", "--test", "2", "--max_prompts", "6", "--extraction", "16"]
        arguments = ["--model", str(start), *names, *sizes, "--judges", f"keywords,{server.url}"]
        assert main([*arguments, "--output", str(tmp_path / "kit")]) == 0
        asked = "".join(message["content"] for request in server.requests for message in request["messages"])
    assert builtin_prompts("held_out").malicious[0] in asked
    files = list(tmp_path.glob("kit/runs/arithmetic_poisoned_10/*/seed-0.json"))
    runs = {path.parent.name: json.loads(path.read_text()) for path in files}
    assert runs.keys() == {"start", "plain", "procon"}
    begun, plain, procon = (runs[name] for name in ("start", "plain", "procon"))
    assert share(begun, "malicious", "refused") > 0.5
    assert len(begun["replies"]["malicious"]) == len(begun["replies"]["benign"]) == 6
    assert any("procon/penalty" in row for row in procon["history"])
    assert not any("procon/penalty" in row for row in plain["history"])
    assert plain["samples"] == procon["samples"] == 44
    assert mean(begun["drift"]["cosine"]) == pytest.approx(1, abs=1e-3)
    assert mean(plain["drift"]["cosine"]) < 1 - 1e-6
    page = (tmp_path / "kit" / "results.md").read_text()
    assert page.startswith(f"# {start}: what defences keep\n")
    assert "Training data: arithmetic word problems, with 10% compliant answers." in page
    assert "in the paper" not in page
    assert "Of the 3 runs that are planned, 3 are there" in page
    assert (tmp_path / "kit" / "figures").is_dir()


def test_a_folder_keeps_to_one_question(tmp_path, capsys):
    """Runs of another model or of other prompts would stand in the same table without a word."""
    keep_to(tmp_path, {"model": "one", "prompts": None, "train": 320})
    keep_to(tmp_path, {"model": "one", "prompts": None, "train": 320})
    (tmp_path / "question.json").unlink()
    keep_to(tmp_path, dict.fromkeys(QUESTION))
    assert main(["--model", "other", "--output", str(tmp_path)]) == 2
    assert "has runs of model None, max_prompts None, reply_tokens None" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["question.json"]


def test_listing_loads_no_judge_and_writes_nothing(tmp_path, capsys):
    folder = tmp_path / "kit"
    assert main(["--model", "none", "--judges", "refusal:nowhere", "--output", str(folder), "--list"]) == 0
    assert "0 of 22 runs" in capsys.readouterr().out
    assert not folder.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ["plane"]}, "there is no method 'plane': did you mean 'plain'?"),
        ({"tasks": ["sums"]}, "there is no job 'sums': choose arithmetic, extraction, passages, swapped"),
        ({"poison": [100]}, "there is no job 'arithmetic_poisoned_100': choose arithmetic, extraction"),
        ({"lengths": [0.0]}, "lengths and seeds are counts: give lengths above 0"),
        ({"seeds": []}, "nothing is compared: give at least one method, task, share of poison, length and seed"),
    ],
)
def test_what_cannot_be_compared_is_named(changes, message):
    given = {"methods": ["plain"], "tasks": ["arithmetic"], "poison": [0], "lengths": [1.0], "seeds": [0]}
    with pytest.raises(ProConError, match=message.replace("?", r"\?")):
        kit_budget(**{**given, **changes}, size=Size())


def test_lengths_are_parts_of_the_same_jobs():
    budget = kit_budget(["plain", "procon"], ["passages"], [0, 30], [1.0, 4.0], [0, 1], Size())
    assert [cell.method for cell in budget.cells()].count("procon_x4") == 4
    assert {cell.job for cell in budget.cells()} == {"passages", "passages_poisoned_30"}
    assert {part.title for part in budget.parts} == {"The usual length", "4 times the steps"}


def test_numbers_are_numbers(capsys):
    assert main(["--model", "any", "--lengths", "one"]) == 2
    assert "kit: error: lengths is 'one': give numbers, joined by commas" in capsys.readouterr().err


def test_the_default_has_a_name():
    assert {"procon", "plain", "safe", "sbr", "kl_0.3"} <= known_methods().keys()
