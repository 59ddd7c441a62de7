"""What the shorter commands do: each takes its arguments, calls the library, and prints what it found."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from procon.chat import ContrastPrompts, Split, builtin_prompts, describe_chat, load_instructions
from procon.cli.arguments import DirectionsArguments, DriftArguments, EvalArguments, QuickstartArguments
from procon.cli.chat import chat_settings
from procon.cli.judging import evaluation_prompts, judging_lines
from procon.data import load_conversations
from procon.demo.quickstart import make_start
from procon.demo.quickstart import quickstart as run_quickstart
from procon.directions import ContrastMeans, Directions, load_vectors
from procon.directions.directions import check_concepts, check_k, numbered
from procon.errors import ProConError, printable
from procon.evaluation import (
    Drift,
    evaluate,
    find_metric,
    load_judge,
    measure_drift,
)
from procon.files import check_writable, save_json
from procon.models import check_name, first_batch_size, load_model
from procon.report import Run, print_table


def quickstart(arguments: QuickstartArguments) -> None:
    """``procon quickstart``"""
    if arguments.start_only:
        place = make_start(arguments.model, arguments.output_dir)
        Console().print(Text(f"Starting model: {printable(place)}"))
        return
    run_quickstart(
        arguments.model,
        arguments.output_dir,
        arguments.seed,
        control=arguments.control,
        trust_remote_code=arguments.trust_remote_code,
    )


def directions(arguments: DirectionsArguments) -> None:
    """``procon directions``"""
    output = _output_file(arguments.output)
    name = arguments.name or "refusal"
    # All that can be wrong is found before a model is loaded.
    vectors = load_vectors(arguments.vectors) if arguments.vectors else None
    prompts = None
    if arguments.positive and arguments.negative:
        prompts = ContrastPrompts(load_instructions(arguments.positive), load_instructions(arguments.negative))
    elif arguments.name is None:
        prompts = _prompts(arguments.malicious, arguments.benign, "extraction")
        check_k(arguments.k, prompts)
    others = Directions.load(arguments.add) if arguments.add else None
    check_concepts((*(others.concepts if others else ()), *numbered(name, arguments.k)))
    model, tokenizer = load_model(arguments.model, **arguments.loading())
    batch_size = first_batch_size(arguments.batch_size, model)
    console, chat = Console(), chat_settings(arguments)
    asked: dict[str, Any] = {"name": name, "chat": chat, "batch_size": batch_size}
    if vectors is None:
        found = Directions.extract(model, tokenizer, prompts, k=arguments.k, **asked)
    else:
        found = Directions.from_vectors(model, vectors, name=name)
    console.print(_table(found))
    if (rate := found.provenance.get("refusal_rate")) is not None:
        console.print(f"The model refuses {rate:.0%} of malicious prompts.")
    if others is not None:
        found = Directions.combine(others, found)
        console.print(f"Concepts: {', '.join(found.concepts)}.")
    found.save(output)
    console.print(Text(f"Written: {printable(str(output))}"))  # a path may look like markup


def _table(found: Directions) -> Table:
    """A row for each block and direction there, and for blocks without any."""
    table = Table("block", "direction", "gap", "held-out AUROC", box=box.SIMPLE_HEAD)
    for site, (gaps, quality) in enumerate(zip(found.gaps.tolist(), found.auroc.tolist(), strict=True)):
        block = str(site) if site < found.block_count else "last output"
        if not any(gaps):
            table.add_row(block, "no direction", "-", "-")
        for name, gap, one in zip(found.concepts, gaps, quality, strict=True):
            if gap:
                table.add_row(block, name, _number(gap, ".3g"), _number(one, ".2f"))
    return table


def _number(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)


def drift(arguments: DriftArguments) -> None:
    """``procon drift``"""
    output = _output_file(arguments.output) if arguments.output else None
    prompts = _prompts(arguments.malicious, arguments.benign, "extraction")
    chat = chat_settings(arguments)
    for name in (arguments.start, arguments.tuned):
        check_name(name)
    model, tokenizer = load_model(arguments.start, **arguments.loading())
    batch_size = first_batch_size(arguments.batch_size, model)
    means = ContrastMeans.measure(model, tokenizer, prompts, chat=chat, batch_size=batch_size)
    reference = Directions.from_means(means)
    del model
    model, _ = load_model(arguments.tuned, **arguments.loading())
    found = measure_drift(model, tokenizer, reference, prompts, chat=chat, batch_size=batch_size)
    if output:
        _write_drift(found, output, describe_chat(tokenizer, chat))
    table = Table("block", "cosine", "malicious shift", "benign shift", box=box.SIMPLE_HEAD)
    for block, row in enumerate(zip(*_columns(found).values(), strict=True)):
        table.add_row(str(block), *("-" if value is None else f"{value:+.3f}" for value in row))
    console = Console()
    console.print(table)
    console.print(f"Mean cosine {found.mean_cosine:.3f}; shifts along the first direction, in units of its gap.")


def evaluation(arguments: EvalArguments) -> None:
    """``procon eval``"""
    output = _output_file(arguments.output) if arguments.output else None
    find_metric(arguments.task_metric)
    prompts, sources = evaluation_prompts(arguments)
    task = _task(arguments.task) if arguments.task else None
    judge = load_judge(arguments.judge, **arguments.loading())
    model, tokenizer = load_model(arguments.model, **arguments.loading())
    batch_size = first_batch_size(arguments.batch_size, model)
    found = evaluate(
        model,
        tokenizer,
        prompts=prompts,
        task=task,
        judge=judge,
        metric=arguments.task_metric,
        label=arguments.model,
        sources=sources,
        chat=chat_settings(arguments),
        max_new_tokens=arguments.max_new_tokens,
        task_max_new_tokens=arguments.task_max_new_tokens,
        batch_size=batch_size,
    )
    if output:
        found.save(output)
    print_table([Run(label=arguments.model, evaluation=found)])
    for line in judging_lines(found):
        Console().print(Text(printable(line)))


def _output_file(path: str) -> Path:
    """The path; refused before any work if it could not be written after it."""
    if Path(path).is_dir():
        raise ProConError(f"output {path!r} is a folder: give a file in it")
    check_writable(path)
    return Path(path)


def _prompts(malicious: str | None, benign: str | None, split: Split) -> ContrastPrompts:
    builtin = builtin_prompts(split)
    if not malicious and not benign:
        return builtin
    return ContrastPrompts(
        load_instructions(malicious) if malicious else builtin.malicious,
        load_instructions(benign) if benign else builtin.benign,
    )


def _task(path: str) -> list[dict[str, str]]:
    """Question and reference of each conversation: its first user and its last assistant turn."""
    data = load_conversations(path)
    if "messages" not in data.column_names:
        raise ProConError(f"task {path!r} has texts, not conversations: give questions with answers")
    rows = []
    for number, turns in enumerate(data["messages"], 1):
        questions, answers = ([t["content"] for t in turns if t["role"] == role] for role in ("user", "assistant"))
        if not questions or not answers:
            raise ProConError(f"task {path!r}, row {number}: give it a user turn and an assistant turn")
        rows.append({"instruction": questions[0], "output": answers[-1]})
    return rows


def _columns(found: Drift) -> dict[str, list[float | None]]:
    columns = {
        "cosine": found.cosine,
        "malicious_shift": found.malicious_shift,
        "benign_shift": found.benign_shift,
    }
    return {name: [None if value != value else value for value in column.tolist()] for name, column in columns.items()}


def _write_drift(found: Drift, path: Path, chat: dict[str, Any]) -> None:
    save_json({"mean_cosine": found.mean_cosine, **_columns(found), **({"chat": chat} if chat else {})}, path)
