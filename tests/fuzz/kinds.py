"""The ways in: what is made for each, and how the library takes it."""

from __future__ import annotations

import csv
import io
import json
import tempfile
from contextlib import suppress
from dataclasses import fields
from functools import cache
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import datasets
import saved
from campaign import Kind
from datasets import Dataset
from rich.console import Console
from texts import HOSTILE, as_json, changed, damaged, encoded, text, value
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from procon.chat import is_degenerate, is_refusal, load_instructions, response_mask
from procon.cli import main
from procon.cli.parsing import parse
from procon.cli.registry import COMMANDS
from procon.data import load_conversations, load_prompt_sets, parse_columns, to_conversations
from procon.data.conversations import _file_samples
from procon.errors import ProConError
from procon.evaluation import Evaluation, Rate, exact_match, extract_answer
from procon.files import MAX_NESTING
from procon.report import Run, print_table, write_html
from procon.schedule import AlphaSchedule
from procon.settings import CHOICES, ChatSettings, ProConSettings, parse_blocks
from procon.training import ProConArguments
from procon.training.drift_gate import DriftGate

#: Where the inputs of a process lie; each is overwritten by the next.
FOLDER = Path(tempfile.mkdtemp(prefix="procon-fuzz-"))


# Schedules and settings

SCHEDULE_PARTS = ("procon_s", "procon_wu", ":", "@", ",", "ep", "steps", "0", "1", "0.2", "-1", "1e-7", "2", "1e400")
SCHEDULE_PARTS += ("nan", "inf", " ", ".", "..", "1_0", "+1", "\u0664", "0.0000001", "9" * 400, "procon_s:0.5@2ep,0")


def make_schedule(random: Random) -> str:
    if random.random() < 0.1:
        return text(random)
    if random.random() < 0.4:  # nearly right
        parts = [("0", "1", ".5", "2e-3"), ("@",), ("1", "0.25", "300", "1e1", "0"), ("ep", "steps", "")]
        phases = ["".join(map(random.choice, parts)) for _ in range(random.randrange(1, 4))]
        return random.choice(("", "procon_wu:", "procon_s:")) + ",".join([*phases, random.choice(("0", "1", "x"))])
    return "".join(random.choice(SCHEDULE_PARTS) for _ in range(random.randrange(9)))


def take_schedule(source: str) -> None:
    schedule = AlphaSchedule.parse(source)
    assert AlphaSchedule.parse(str(schedule)) == schedule
    for step in (0, 1, 1000):
        assert 0 <= schedule.alpha(step, 7) < float("inf")
    schedule.extra_steps(7)


#: Of settings that are no choice among words.
_VALUES = {
    "schedule": ("procon_s", "0"),
    "blocks": ("all", 0.5, [1, 2], "1", "1,2", "all,last"),
    "anchors_dir": (None, "anchors"),
    "probes": ("builtin", "none", "probes.txt"),
    "probe_batch": (1, 8),
    "probe_every": (1, 2),
    "probe_weight": (0.5, 50),
    "probe_reply_tokens": (0, 48),
    "system_prompt": (None, "Be brief."),
    "chat_template_kwargs": ({}, {"enable_thinking": False}),
    "thinking_markers": ((), ("</think>",), ["<a>", "</a>"]),
    "thinking_tokens": (1, 64),
    "gate": (None, 0.9),
    "columns": (None, "prompt=q,response=a", "text=t"),
    "prompt_sets": ("xstest", "harmbench@main,xstest"),
}


def make_settings(random: Random) -> dict[str, Any]:
    def one(name: str) -> Any:
        kind = random.random()
        if kind < 0.5 and name in CHOICES:
            return random.choice(CHOICES[name])
        if kind < 0.5:
            return random.choice(_VALUES[name])
        if kind < 0.6:
            return random.choice((b"all", {1}, object(), len, 1j, (1, 2), range(3), [True], [[1]], Path("x"), [None]))
        return value(random)

    names = [*CHOICES, *_VALUES]
    return {name: one(name) for name in names if random.random() < 0.4}


_OF_PROCON = {field.name.removeprefix("procon_") for field in fields(ProConArguments)}


def _of(settings: type, values: dict[str, Any]) -> dict[str, Any]:
    return {item.name: values[item.name] for item in fields(settings) if item.name in values}


def take_settings(values: dict[str, Any]) -> None:
    not_here = mock.patch("procon.data.prompt_sets._rows", side_effect=ProConError("not on this machine"))
    with not_here, suppress(ProConError):
        load_prompt_sets(str(values.get("prompt_sets", "xstest")))
    refused = []
    for build in (
        lambda: ProConSettings(**_of(ProConSettings, values)),
        lambda: ProConArguments(**{f"procon_{name}": values[name] for name in values if name in _OF_PROCON}),
        lambda: ChatSettings(**_of(ChatSettings, values)),
        lambda: DriftGate.parse(values.get("gate"), values.get("gate_action", "warn")),
        lambda: parse_columns(values.get("columns")),
        lambda: parse_blocks(values.get("blocks", "all")),
    ):
        try:
            build()
        except ProConError as error:
            refused.append(error)
    if refused:
        raise refused[0]


# Files

CONVERSATION = [{"role": "user", "content": "Two and two?"}, {"role": "assistant", "content": "Four."}]


def make_rows(random: Random) -> list[Any]:
    def one() -> Any:
        kind = random.randrange(5)
        if kind == 4:
            call = {"function": {"name": "f", "arguments": random.choice(('{"a": 1}', "a", {}))}}
            answer = {"role": "assistant", "content": None, "tool_calls": random.choice(([call], "[]"))}
            tools = random.choice(([{"name": "f"}], "[{}]", text(random)))
            return {"messages": changed(random, [CONVERSATION[0], answer]), "tools": tools}
        if kind == 0:
            return {"prompt": text(random), "completion": text(random), "n": value(random)}
        if kind == 1:
            return {"instruction": "Add.", "input": random.choice(("", "1 2", None, 3)), "output": text(random)}
        if kind == 2:
            turns = [dict(turn, content=text(random)) for turn in CONVERSATION * random.randrange(3)]
            return {"messages": changed(random, turns)}
        return {"prompt": list(CONVERSATION[:1]), "completion": list(CONVERSATION[1:])}

    template = one()
    rows = [dict(template) if random.random() < 0.7 else one() for _ in range(random.randrange(1, 5))]
    return changed(random, rows) if random.random() < 0.3 else rows


def make_file(random: Random) -> tuple[str, bytes]:
    """A data file: its ending and its content."""
    suffix = random.choice((".json", ".jsonl", ".jsonl", ".csv", ".parquet"))
    rows = make_rows(random)
    if suffix == ".parquet":
        return suffix, damaged(random, parquet(rows))
    if suffix == ".csv":
        file = io.StringIO()
        flat = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
        columns = sorted({key for row in flat for key in row})
        writer = csv.writer(file, delimiter=random.choice(",,,;\t"))
        writer.writerows([columns, *([str(row.get(key, "")) for key in columns] for row in flat)])
        return suffix, damaged(random, encoded(random, file.getvalue()))
    if suffix == ".jsonl" and isinstance(rows, list):
        content = random.choice(("\n", "\n", "\r\n", "\n\n")).join(map(as_json, rows))
    else:
        content = as_json(rows)
    return suffix, damaged(random, encoded(random, content))


@cache
def _parquet_of(rows: str) -> bytes:
    import pyarrow as pa
    from pyarrow import parquet as pq

    file = io.BytesIO()
    try:
        pq.write_table(pa.Table.from_pylist(json.loads(rows)), file)
    except Exception:  # no table has these rows
        pq.write_table(pa.table({"prompt": ["a"], "completion": ["b"]}), file)
    return file.getvalue()


def parquet(rows: list[Any]) -> bytes:
    return _parquet_of(json.dumps(rows))


def write(name: str, content: bytes) -> Path:
    path = FOLDER / name
    path.write_bytes(content)
    return path


def take_file(file: tuple[str, bytes]) -> None:
    """Without the cache of ``datasets``, which costs more than the reading."""
    for row in _file_samples(str(write(f"data{file[0]}", file[1])), {}, None):
        check_sample(row)


def check_sample(row: dict[str, Any]) -> None:
    for turn in row["messages"]:
        assert isinstance(turn["role"], str)
        assert isinstance(turn["content"], str)


def take_whole_file(file: tuple[str, bytes]) -> None:
    loaded = load_conversations(write(f"whole{file[0]}", file[1]))
    for row in loaded:
        check_sample(row)


def make_prompts(random: Random) -> tuple[str, bytes]:
    suffix = random.choice((".txt", ".json", ".jsonl", ".csv", ""))
    rows = [random.choice(({"prompt": text(random)}, {"instruction": text(random)}, text(random))) for _ in range(3)]
    rows = changed(random, rows)
    if suffix == ".json":
        content = as_json(rows)
    else:
        write_row = str if suffix == ".txt" else as_json
        content = "\n".join(map(write_row, rows if isinstance(rows, list) else [rows]))
    return suffix, damaged(random, encoded(random, content))


def take_prompts(file: tuple[str, bytes]) -> None:
    for prompt in load_instructions(write(f"prompts{file[0]}", file[1])):
        assert prompt.strip() == prompt != ""
        prompt.encode()


# Conversations, through a template

TEMPLATES = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content | trim }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content | trim }}</s>"
    "{% else %}{{ raise_exception('roles must alternate\x1b[2J') }}{% endif %}{% endfor %}",
)


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte."""
    words = ["<|pad|>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    model = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, merges=[]))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<|pad|>", eos_token="<|im_end|>")


def make_conversation(random: Random) -> tuple[int, list[Any]]:
    roles = ("user", "assistant", "user", "assistant", "system", "tool", text(random, 5))
    turns = [{"role": random.choice(roles), "content": text(random)} for _ in range(random.randrange(1, 6))]
    return random.randrange(len(TEMPLATES)), changed(random, turns) if random.random() < 0.3 else turns


def take_conversation(given: tuple[int, list[Any]]) -> None:
    from procon.data.formats import sample_of

    template, turns = given
    messages = sample_of({"messages": turns}, "row 1")["messages"]
    tokenizer().chat_template = TEMPLATES[template]
    ids, mask = response_mask(tokenizer(), messages)
    assert len(ids) == len(mask)


def take_rows(rows: Any) -> None:
    """Through ``datasets``, if they are rows to it."""
    try:
        dataset = Dataset.from_list(rows)
    except Exception as error:  # of Arrow's types: no dataset has these rows
        raise ProConError("no dataset") from error
    for row in to_conversations(dataset):
        check_sample(row)


# YAML and flags

NAMES = ("model", "data", "seed", "batch_size", "dtype", "output", "malicious", "k", "learning_rate", "procon_blocks")
NAMES += (
    "procon_schedule",
    "lr_scheduler_kwargs",
    "label_names",
    "lora_targets",
    "flatten",
    "max_steps",
    "nonsense",
    "<<",
)


def make_yaml(random: Random) -> tuple[str, bytes]:
    command = random.choice(("eval", "directions", "drift", "quickstart"))
    lines = [f"{random.choice(('model', 'model', 'start', 'tuned'))}: m"]
    for _ in range(random.randrange(5)):
        written = random.choice((text, lambda r: as_json(value(r))))(random)
        lines.append(f"{random.choice(NAMES)}: {written}")
    return command, damaged(random, encoded(random, "\n".join(lines)))


def make_training_yaml(random: Random) -> tuple[str, bytes]:
    command, content = make_yaml(random)
    return "train", content + b"\nmodel: m\ndata: d\n" if command == "eval" else content + b"\ndata: d\n"


def take_yaml(given: tuple[str, bytes]) -> None:
    command, content = given
    parse(command, ["--config", str(write("settings.yaml", content))])


def make_flags(random: Random) -> list[str]:
    command = random.choice(("eval", "directions", "drift", "quickstart", "eval", text(random, 5)))
    argv = [command, *random.choice((["--model", "m"], ["--start", "m", "--tuned", "n"], []))]
    for _ in range(random.randrange(5)):
        name = random.choice(
            [*NAMES, "max_new_tokens", "task", "config", "control", "output_dir", "help", "trust-remote-code"]
        )
        argv += [f"--{name}"] if random.random() < 0.9 else [text(random, 5)]
        if random.random() < 0.8:
            argv.append(
                random.choice((text(random), "2", "out[/x]", str(FOLDER), str(FOLDER / "file.jsonl"), "/proc/x"))
            )
    return argv


def make_training_flags(random: Random) -> list[str]:
    argv = make_flags(random)[1:]
    return ["train", "--model", "m", "--data", str(FOLDER / "file.jsonl"), *argv]


def take_flags(argv: list[str]) -> None:
    """All that a command does before it has a model."""
    write("file.jsonl", b'{"prompt": "a", "completion": "b"}\n')
    error = io.StringIO()
    stop = mock.Mock(side_effect=ProConError("so far, so good"))
    with (
        mock.patch("sys.stderr", error),
        mock.patch("procon.cli.commands.load_model", stop),
        mock.patch("procon.cli.train.load_model", stop),
        mock.patch("procon.demo.quickstart.load_model", stop),
        mock.patch("procon.demo.quickstart.fetch_demo_model", stop),
    ):
        try:
            code = main(argv)
        except SystemExit as end:  # --help
            code = end.code
    if code == 0:
        return
    lines = [line for line in error.getvalue().split("\n") if line.startswith("procon: error: ")]
    assert code == 2, error.getvalue()
    assert len(lines) == 1, error.getvalue()
    if "so far, so good" not in lines[0]:
        raise ProConError(lines[0])


# Runs and replies


def make_run(random: Random) -> bytes:
    replies = [
        {"kind": "malicious", "prompt": "a", "reply": text(random), "refused": True, "degenerate": False},
        {
            "kind": "task",
            "prompt": "b",
            "reply": "Answer: 3",
            "refused": False,
            "degenerate": False,
            "reference": text(random),
            "correct": False,
        },
    ]
    run = Run(
        label=random.choice(("ProCon", "plain", text(random))),
        evaluation=Evaluation("x", Rate(1, 2), Rate(0, 2), Rate(0, 4), random.choice((None, Rate(1, 1))), replies),
        cosine=random.choice((None, [0.5, float("nan")])),
        seconds_per_step=random.choice((None, 0.1)),
        history=[{"step": 1, "loss": 0.5, "procon/penalty": 1e-3}, {"train_runtime": 2.0}],
    ).to_dict()
    return damaged(random, encoded(random, as_json(changed(random, run) if random.random() < 0.5 else run)))


def take_run(content: bytes) -> None:
    run = Run.load(write("run.json", content))
    console = Console(file=io.StringIO(), width=120)
    print_table([run], console)
    assert "\x1b" not in console.file.getvalue()


def take_report(content: bytes) -> None:
    run = Run.load(write("run.json", content))
    page = write_html([run, run], FOLDER / "report.html", title=run.label, notes=[run.label], facts={"x": run.label})
    assert "<script>alert" not in page.read_text()


def make_replies(random: Random) -> tuple[str, str]:
    def long() -> str:
        part = random.choice((text(random), random.choice(HOSTILE), "I cannot ", "Answer: 1,000 ", "ab ", "a-", "n't "))
        return (part * random.choice((1, 3, 100, 2000)))[:100_000]

    return long() + long(), long()


def take_replies(given: tuple[str, str]) -> None:
    for reply in given:
        assert is_refusal(reply) in (True, False)
        assert is_degenerate(reply) in (True, False)
        assert isinstance(extract_answer(reply), str)
    exact_match(*given)


#: Every hostile file that is known to have broken something, as it was.
KNOWN: list[tuple[str, bytes]] = [
    (".jsonl", b"[" * 20_000),
    (".jsonl", b'{"a":' * 20_000),
    (".json", b"[" * 1_000_000),
    (".jsonl", b'{"prompt": ' + b"9" * 50_000 + b"}"),
    (".jsonl", b'{"prompt": "' + b"a" * 5_000_000 + b'", "completion": "b"}'),
    (".csv", b"prompt,completion\n" + b"a" * 5_000_000),
    (".csv", b'prompt,completion\n"' + b"a\n" * 1_000_000),
    (".jsonl", b"\n" * 1_000_000),
    (".jsonl", b"{" + b'"a":1,' * 100_000),
    (".json", b"[" + b"[]," * 100_000 + b"[]]"),
    (".jsonl", (b"[" * MAX_NESTING + b"]" * MAX_NESTING + b"\n") * 1_000),
    (".jsonl", b'"' * 1_000_001),
    (".jsonl", b'"' + b"\\" * 1_000_001),
    (".parquet", b"PAR1" + b"\xff" * 100_000 + b"PAR1"),
]


def make_known(random: Random) -> tuple[str, bytes]:
    return KNOWN[random.randrange(len(KNOWN))]


def take_known(file: tuple[str, bytes]) -> None:
    with suppress(ProConError):
        take_prompts(file)
    take_file(file)


def _quiet() -> None:
    datasets.disable_progress_bars()
    datasets.config.HF_DATASETS_CACHE = FOLDER / "cache"


_quiet()

KINDS = {
    "schedules": Kind(make_schedule, take_schedule, 40_000),
    "settings": Kind(make_settings, take_settings, 15_000),
    "data files": Kind(make_file, take_file, 15_000),
    "data files, with the cache": Kind(make_file, take_whole_file, 1_500),
    "data files, known to break readers": Kind(make_known, take_known, 50),
    "prompt files": Kind(make_prompts, take_prompts, 10_000),
    "conversations": Kind(make_conversation, take_conversation, 8_000),
    "datasets": Kind(make_rows, take_rows, 1_000),
    "YAML": Kind(make_yaml, take_yaml, 4_000),
    "YAML of training": Kind(make_training_yaml, take_yaml, 500),
    "flags": Kind(make_flags, take_flags, 4_000),
    "flags of training": Kind(make_training_flags, take_flags, 500),
    "run files, as a table": Kind(make_run, take_run, 10_000),
    "run files, as a page": Kind(make_run, take_report, 500),
    "replies": Kind(make_replies, take_replies, 3_000),
    "folders and files of reports": Kind(saved.make_reported, saved.take_reported, 10_000),
    "configurations of accelerate": Kind(saved.make_accelerate, saved.take_accelerate, 2_000),
    "forged tensors": Kind(saved.make_tensors, saved.take_tensors, 5_000),
    "manifests": Kind(saved.make_manifest, saved.take_manifest, 2_000),
    "names": Kind(saved.make_name, saved.take_name, 5_000),
    "judges": Kind(saved.make_judges, saved.take_judges, 3_000),
}
# What the others take is in their own tests, and in "folders and files of reports".
assert set(COMMANDS) - {"env", "completion", "report", "compare"} == {
    *("eval", "directions", "drift", "quickstart", "train"),
}
