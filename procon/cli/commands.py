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
from procon.cli.arguments import (
    DirectionsArguments,
    DriftArguments,
    EvalArguments,
    PromptArguments,
    QuickstartArguments,
    ReportArguments,
)
from procon.data import load_conversations, load_prompt_sets
from procon.demo.quickstart import make_start
from procon.demo.quickstart import quickstart as run_quickstart
from procon.directions import ContrastMeans, Directions
from procon.directions.directions import check_k
from procon.errors import ProConError, printable
from procon.evaluation import evaluate, find_metric, load_judge, measure_drift
from procon.files import check_writable, save_json
from procon.method.record import RECORD
from procon.models import first_batch_size, load_model
from procon.report import Run, print_table, read_runs, write_html
from procon.training.model_card import write_evaluation


def quickstart(arguments: QuickstartArguments) -> None:
    """``procon quickstart``"""
    settings = dict(vars(arguments))
    if settings.pop("start_only"):
        place = make_start(arguments.model, arguments.output_dir)
        Console().print(Text(f"Starting model: {printable(place)}"))
        return
    run_quickstart(**settings)


def directions(arguments: DirectionsArguments) -> None:
    """``procon directions``"""
    output = check_writable(arguments.output)
    # All that can be wrong is found before a model is loaded.
    prompts = _prompts(arguments, "extraction")
    check_k(arguments.k, prompts)
    model, tokenizer = load_model(arguments.model, **arguments.loading())
    found = Directions.extract(
        model,
        tokenizer,
        prompts,
        k=arguments.k,
        chat=arguments.chat(),
        batch_size=first_batch_size(arguments.batch_size, model),
    )
    console = Console()
    console.print(_table(found))
    if (rate := found.provenance.get("refusal_rate")) is not None:
        console.print(f"The model refuses {rate:.0%} of malicious prompts.")
    found.save(output)
    _say_where(output)


def _table(found: Directions) -> Table:
    """A row for each block and direction there, and for blocks without any."""
    table = Table("block", "direction", "gap", "held-out AUROC", box=box.SIMPLE_HEAD)
    for block, (gaps, quality) in enumerate(zip(found.gaps.tolist(), found.auroc.tolist(), strict=True)):
        if not any(gaps):
            table.add_row(str(block), "no direction", "-", "-")
        for name, gap, one in zip(found.concepts, gaps, quality, strict=True):
            if gap:
                table.add_row(str(block), name, f"{gap:.3g}", f"{one:.2f}")
    return table


def drift(arguments: DriftArguments) -> None:
    """``procon drift``"""
    output = check_writable(arguments.output) if arguments.output else None
    prompts, chat = _prompts(arguments, "extraction"), arguments.chat()
    model, tokenizer = load_model(arguments.start, **arguments.loading())
    batch_size = first_batch_size(arguments.batch_size, model)
    means = ContrastMeans.measure(model, tokenizer, prompts, chat=chat, batch_size=batch_size)
    reference = Directions.from_means(means)
    del model
    model, _ = load_model(arguments.tuned, **arguments.loading())
    found = measure_drift(model, tokenizer, reference, prompts, chat=chat, batch_size=batch_size)
    names = ("cosine", "malicious_shift", "benign_shift")
    columns = {
        name: [None if math.isnan(value) else value for value in getattr(found, name).tolist()] for name in names
    }
    if output:
        about = describe_chat(tokenizer, chat)
        save_json({"mean_cosine": found.mean_cosine, **columns, **({"chat": about} if about else {})}, output)
    table = Table("block", "cosine", "malicious shift", "benign shift", box=box.SIMPLE_HEAD)
    for block, row in enumerate(zip(*columns.values(), strict=True)):
        table.add_row(str(block), *("-" if value is None else f"{value:+.3f}" for value in row))
    console = Console()
    console.print(table)
    console.print(
        f"Mean cosine {found.mean_cosine:.3f}: 1 is no drift, and a high one is no proof that refusals are kept. "
        "Shifts are along the first direction, in units of its gap."
    )


def evaluation(arguments: EvalArguments) -> None:
    """``procon eval``"""
    output = check_writable(arguments.output) if arguments.output else _beside(Path(arguments.model))
    find_metric(arguments.task_metric)
    prompts, sources = _evaluation_prompts(arguments)
    task = _task(arguments.task) if arguments.task else None
    judge = load_judge(arguments.judge, **arguments.loading())
    model, tokenizer = load_model(arguments.model, **arguments.loading())
    found = evaluate(
        model,
        tokenizer,
        prompts=prompts,
        task=task,
        judge=judge,
        metric=arguments.task_metric,
        label=arguments.model,
        sources=sources,
        chat=arguments.chat(),
        max_new_tokens=arguments.max_new_tokens,
        task_max_new_tokens=arguments.task_max_new_tokens,
        batch_size=first_batch_size(arguments.batch_size, model),
    )
    if output:
        found.save(output)
    print_table([Run(label=arguments.model, evaluation=found)])
    if found.judge != "keywords":
        Console().print(Text(printable(f"Refusals are judged by {found.judge}.")))
    if output:
        _say_where(output)
        if output.parent == Path(arguments.model):
            write_evaluation(output.with_name("README.md"), found)


def report(arguments: ReportArguments) -> None:
    """``procon report``"""
    output = check_writable(arguments.output)
    runs = read_runs(arguments.runs)
    title = arguments.title or ", ".join(run.label for run in runs)
    write_html(runs, output, title=title, facts=dict(zip((run.label for run in runs), arguments.runs, strict=True)))
    print_table(runs)
    _say_where(output)


def _beside(model: Path) -> Path | None:
    """Where ``procon report`` looks for the evaluation of a model that was trained here; None of any other model."""
    return check_writable(model / "eval.json") if (model / RECORD).is_file() else None


def _say_where(output: Path) -> None:
    Console().print(Text(f"Written: {printable(str(output))}"))  # a path may look like markup


def _prompts(arguments: PromptArguments, split: Split, given: ContrastPrompts | None = None) -> ContrastPrompts:
    """Of each kind, those of the file, if there is one."""
    prompts = given or builtin_prompts(split)
    if not arguments.malicious and not arguments.benign:
        return prompts
    return ContrastPrompts(
        load_instructions(arguments.malicious) if arguments.malicious else prompts.malicious,
        load_instructions(arguments.benign) if arguments.benign else prompts.benign,
    )


def _evaluation_prompts(arguments: EvalArguments) -> tuple[ContrastPrompts, dict[str, dict[str, Any]]]:
    """The prompts, and where each kind comes from; a file goes before a set, and a set before the built-in ones."""
    if not arguments.prompts:
        found, sources = None, {}
    else:
        found, sources = load_prompt_sets(arguments.prompts, most=arguments.max_prompts)
    prompts = _prompts(arguments, "held_out", found)
    for kind in ("malicious", "benign"):
        if path := getattr(arguments, kind):
            sources[kind] = {"set": "file", "source": path, "prompts": len(getattr(prompts, kind))}
    return prompts, sources


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
