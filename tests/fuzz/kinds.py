"""The ways in: what is made for each, and how the library takes it."""

from __future__ import annotations

import csv
import io
import json
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import datasets
import torch
from rich.console import Console
from texts import as_bytes, as_json, changed, damaged, text, value

from procon.chat import is_degenerate, is_refusal, load_instructions
from procon.cli import main
from procon.cli.parsing import COMMANDS, parse
from procon.data import load_conversations, parse_columns
from procon.directions import Directions
from procon.errors import ProConError
from procon.evaluation import Evaluation, extract_answer
from procon.method import Probes
from procon.report import print_table, read_runs, write_html
from procon.schedule import AlphaSchedule
from procon.settings import CHOICES, ChatSettings, ProConSettings, parse_blocks
from procon.training import ProConArguments

#: Where the inputs of a process lie; each is overwritten by the next.
FOLDER = Path(tempfile.mkdtemp(prefix="procon-fuzz-"))

datasets.disable_progress_bars()
datasets.config.HF_DATASETS_CACHE = FOLDER / "cache"


@dataclass(frozen=True)
class Kind:
    """One way in.

    Attributes:
        make: an input from a source of chance.
        take: gives it to the library; what it raises but ProConError is a traceback.
        count: inputs of the whole campaign.
    """

    make: Callable[[Random], Any]
    take: Callable[[Any], None]
    count: int


def write(name: str, content: bytes) -> Path:
    path = FOLDER / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return path


# Settings

PHASES = ("procon_s", "procon_wu", ":", "@", ",", "ep", "steps", "0", "1", "0.2", "-1", "1e-7", "2", "1e400", "nan")
PHASES += ("inf", " ", ".", "1_0", "+1", "\u0664", "0.0000001", "9" * 400, "procon_s:0.5@2ep,0", "300", "1@2ep,")


def make_schedule(random: Random) -> str:
    return text(random) if random.random() < 0.1 else "".join(random.choices(PHASES, k=random.randrange(9)))


def take_schedule(source: str) -> None:
    schedule = AlphaSchedule.parse(source)
    assert AlphaSchedule.parse(str(schedule)) == schedule
    assert all(0 <= schedule.alpha(step, 7) < float("inf") for step in (0, 1, 1000))


#: What settings may have: defaults, words, and others.
GOOD = {field.name: (field.default,) for field in (*fields(ProConSettings), *fields(ChatSettings))} | CHOICES
GOOD |= {"blocks": (0.5, [1, 2], "1,2", "-1"), "columns": (None, "prompt=q,response=a", "text=t")}
GOOD |= {"chat_template_kwargs": ({}, {"enable_thinking": False}), "thinking_markers": ((), ["<a>", "</a>"])}
ODD = (b"all", {1}, object(), len, 1j, (1, 2), range(3), [True], [[1]], Path("x"), [None])


def make_settings(random: Random) -> dict[str, Any]:
    def one(name: str) -> Any:
        kind = random.random()
        return random.choice(GOOD[name]) if kind < 0.8 else random.choice(ODD) if kind < 0.85 else value(random)

    return {name: one(name) for name in GOOD if random.random() < 0.3}


def take_settings(values: dict[str, Any]) -> None:
    def of(settings: type) -> dict[str, Any]:
        return {field.name: values[field.name] for field in fields(settings) if field.name in values}

    refused = []
    for build in (
        lambda: ProConSettings(**of(ProConSettings)),
        lambda: ProConArguments(**{f"procon_{name}": given for name, given in of(ProConSettings).items()}),
        lambda: ChatSettings(**of(ChatSettings)),
        lambda: parse_columns(values.get("columns")),
        lambda: parse_blocks(str(values.get("blocks", "all"))),
    ):
        try:
            build()
        except ProConError as error:
            refused.append(error)
    if refused:
        raise refused[0]


# The command line

NAMES = ("model", "data", "seed", "batch_size", "dtype", "output", "malicious", "k", "learning_rate", "procon_blocks")
NAMES += ("procon_schedule", "lr_scheduler_kwargs", "label_names", "lora_targets", "flatten", "max_steps", "nonsense")
NAMES += ("max_new_tokens", "task", "config", "output_dir", "help", "trust-remote-code", "chat_template_kwargs", "<<")
WORDS = {"report": ["file.jsonl"], "drift": ["m", "n"], "train": ["m", "file.jsonl"]}


def make_yaml(random: Random) -> tuple[str, bytes]:
    command = random.choice((*COMMANDS, "eval", "directions"))
    lines = [f"{random.choice(NAMES)}: {random.choice((text, value))(random)}" for _ in range(random.randrange(5))]
    return command, damaged(random, as_bytes(random, "\n".join(lines)))


def take_yaml(given: tuple[str, bytes]) -> None:
    command, content = given
    write("file.jsonl", b"{}")
    parse(command, [*WORDS.get(command, ["m"]), "--config", str(write("settings.yaml", content))])


def make_flags(random: Random) -> list[str]:
    command = random.choice((*COMMANDS, "eval", "directions", text(random, 5)))
    argv = [command, *random.choice((WORDS.get(command, ["m"]), []))]
    for _ in range(random.randrange(5)):
        argv.append(f"--{random.choice(NAMES)}" if random.random() < 0.9 else text(random, 5))
        if random.random() < 0.8:
            argv.append(random.choice((text(random), "2", "out[/x]", str(FOLDER), "file.jsonl", "/proc/x")))
    return argv


def take_flags(argv: list[str]) -> None:
    """All that a command does before it has a model."""
    write("file.jsonl", b'{"prompt": "a", "completion": "b"}\n')
    error = io.StringIO()
    stop = mock.Mock(side_effect=ProConError("so far, so good"))
    with (
        mock.patch("sys.stderr", error),
        mock.patch("procon.cli.commands.load_model", stop),
        mock.patch("procon.cli.train.load_model", stop),
        mock.patch("procon.cli.commands.run_quickstart", stop),
    ):
        code = main(argv)
    if code:
        (line,) = [line for line in error.getvalue().split("\n") if line.startswith("procon: error: ")]
        assert code == 2, error.getvalue()
        if "so far, so good" not in line:
            raise ProConError(line)


# Files

TURNS = [{"role": "user", "content": "Two and two?"}, {"role": "assistant", "content": "Four."}]
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": '{"a": 1}'}}]}
ROWS = (
    {"prompt": "Two and two?", "completion": "Four.", "n": 1},
    {"instruction": "Add.", "input": "1 2", "output": "3"},
    {"messages": TURNS * 2},
    {"messages": [TURNS[0], CALL], "tools": [{"name": "f"}]},
    {"messages": [TURNS[0], CALL | {"tool_calls": "[{}]"}], "tools": "[{}]"},
    {"prompt": TURNS[:1], "completion": TURNS[1:]},
    {"text": "Some words."},
)


def make_rows(random: Random, suffixes: tuple[str, ...] = (".json", ".jsonl", ".csv")) -> tuple[str, bytes]:
    """A data file: its ending and its content."""
    suffix, template = random.choice(suffixes), random.choice(ROWS)
    rows = [changed(random, template if random.random() < 0.8 else random.choice(ROWS)) for _ in range(3)]
    if suffix == ".csv":
        file = io.StringIO()
        columns = list(template)
        csv.writer(file).writerows([columns, *(list(row.values()) for row in rows if isinstance(row, dict))])
        content = file.getvalue()
    elif suffix == ".json":
        content = as_json(rows)
    else:
        content = random.choice(("\n", "\n", "\r\n", "\n\n")).join(map(as_json, rows))
    return suffix, damaged(random, as_bytes(random, content))


def take_rows(file: tuple[str, bytes]) -> None:
    for row in load_conversations(write(f"data{file[0]}", file[1])):
        for turn in row.get("messages") or [{"role": "", "content": row["text"]}]:
            assert set(turn) >= {"role", "content"}
            turn["role"].encode()


def take_prompts(file: tuple[str, bytes]) -> None:
    for prompt in load_instructions(write(f"prompts{file[0]}", file[1])):
        assert prompt.strip() == prompt != ""
        prompt.encode()


REPLY = {"kind": "malicious", "prompt": "a", "reply": "No.", "refused": True, "degenerate": False}
ROW = {"step": 1, "loss": 0.5, "procon/drift_cos_block/00": 0.9, "procon/penalty": 1e-3}
RATE = {"hits": 1, "total": 2}
EVALUATION = {
    **dict.fromkeys(("refusal_malicious", "refusal_benign", "degenerate", "unfinished"), RATE),
    **{"label": "x", "task": {"value": 0.5, "deviation": 0.1, "total": 2}, "replies": [REPLY], "judges": ["keywords"]},
    **{"judge": "keywords", "chat": {"system_prompt": None}},
}
RECORD = {"schedule": "0.2", "run": {"seed": 1}}

#: What ``procon report`` reads: files of a training folder, or one alone.
REPORTED: tuple[dict[str, Any], ...] = (
    {"procon.json": RECORD, "eval.json": EVALUATION, "trainer_state.json": {"log_history": [ROW, ROW]}},
    {"r.json": EVALUATION},
    {"r.json": {"mean_cosine": 0.5, "cosine": [None, 0.5]}},
    {"r.json": {"label": "x", "evaluation": EVALUATION, "history": [ROW], "cosine": [0.5]}},
)


def make_reported(random: Random) -> dict[str, bytes]:
    files = random.choice(REPORTED)
    return {
        name: damaged(random, as_bytes(random, as_json(changed(random, content) if random.random() < 0.5 else content)))
        for name, content in files.items()
    }


def take_reported(files: dict[str, bytes], page: bool = False) -> None:
    for path in (FOLDER / "run").glob("*"):
        path.unlink()
    paths = [write(f"run/{name}", content) for name, content in files.items()]
    if len(paths) == 1:
        with suppress(ProConError):
            Evaluation.load(paths[0])
    runs, console = (
        read_runs([paths[0] if len(paths) == 1 else FOLDER / "run"] * 2),
        Console(file=io.StringIO(), width=120),
    )
    print_table(runs, console)
    assert "\x1b" not in console.file.getvalue()
    if page:
        assert "<script>alert" not in write_html(runs, FOLDER / "report.html", title=runs[0].label).read_text()


def make_tensors(random: Random) -> tuple[Callable[[Path], Any], bytes]:
    """A reader, and a file for it: the header is JSON, so it is changed as JSON; then bytes are damaged."""
    unit, lengths, path = torch.nn.functional.normalize(torch.ones(3, 4), dim=-1), torch.tensor([2, 3]), FOLDER / "good"
    read = random.choice((Directions.load, Probes.load))
    if read == Directions.load:
        Directions(unit[:, None], torch.ones(3, 1)).save(path)
    else:
        ids, tokens = torch.ones(2, 3).long(), torch.ones(4, random.choice((0, 5))).long()
        Probes(ids, lengths - 1, lengths, torch.ones(4, 5), tokens, torch.tensor(0)).save(path)
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = as_json(changed(random, json.loads(content[8:end]))).encode(errors="replace")
    whole = len(header).to_bytes(8, "little") + header + content[end:]
    return read, damaged(random, whole if random.random() < 0.7 else content)


def take_tensors(given: tuple[Callable[[Path], Any], bytes]) -> None:
    given[0](write("forged.safetensors", given[1]))


def make_reply(random: Random) -> str:
    part = random.choice((text(random), "I cannot ", "Answer: 1,000 ", "ab ", "a-", "n't "))
    return (part * random.choice((1, 3, 100, 2000)))[:100_000]


def take_reply(reply: str) -> None:
    assert {is_refusal(reply), is_degenerate(reply)} <= {True, False}
    assert isinstance(extract_answer(reply), str)


KINDS = {
    "schedules": Kind(make_schedule, take_schedule, 40_000),
    "settings": Kind(make_settings, take_settings, 20_000),
    "YAML": Kind(make_yaml, take_yaml, 3_000),
    "flags": Kind(make_flags, take_flags, 3_000),
    "data files": Kind(make_rows, take_rows, 3_000),
    "prompt files": Kind(partial(make_rows, suffixes=(".json", ".jsonl", ".txt", "")), take_prompts, 13_000),
    "folders and files of reports": Kind(make_reported, take_reported, 10_000),
    "pages of reports": Kind(make_reported, partial(take_reported, page=True), 200),
    "forged tensors": Kind(make_tensors, take_tensors, 5_000),
    "replies": Kind(make_reply, take_reply, 3_000),
}
