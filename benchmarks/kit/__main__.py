"""``python -m benchmarks.kit``: fine-tune a model by several defences, and write a page of what they keep."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.harness.command import run_command
from benchmarks.kit.page import write_page
from benchmarks.kit.plan import kit_budget
from benchmarks.study.jobs import REPLY_TOKENS
from benchmarks.study.missing import make_runs
from benchmarks.study.plan import Size
from benchmarks.study.start import Start, open_start
from benchmarks.study.trial import Asked, make_run
from procon.chat import ContrastPrompts, builtin_prompts
from procon.data import load_prompt_sets
from procon.errors import ProConError
from procon.evaluation import load_judge
from procon.files import load_json, save_json

#: Settings that all runs of a folder share. Methods, tasks, shares, lengths and seeds are in the runs' names.
QUESTION = ("model", "base", "prompts", "max_prompts", "judges", "reply_tokens", "train", "test", "extraction")


@dataclass
class KitArguments:
    """Fine-tune by every method, on every task, clean and poisoned, at every length; one JSON per run, and a page."""

    model: str = field(
        metadata={"help": "Chat model to start from: a folder, a hub name, or smollm2 or qwen, as in the study."}
    )
    methods: str = field(
        default="plain,safe_100,kl_0.1,sbr_10_each,procon",
        metadata={"help": "Names of the study's methods, joined by commas."},
    )
    tasks: str = field(
        default="arithmetic",
        metadata={"help": "arithmetic, extraction, passages, swapped; from the hub gsm8k, sst2, dolly."},
    )
    poison: str = field(default="0,10", metadata={"help": "Per cent of compliant answers to malicious requests."})
    lengths: str = field(default="1,4", metadata={"help": "Multiples of the usual steps."})
    seeds: str = field(default="0", metadata={"help": "Seeds, joined by commas."})
    prompts: str | None = field(
        default=None, metadata={"help": "Published prompt sets, as in procon eval; the built-in ones if not given."}
    )
    max_prompts: int = field(default=64, metadata={"help": "At most so many prompts of each kind."})
    judges: str | None = field(default=None, metadata={"help": "Judge, as in procon eval; keywords if not given."})
    reply_tokens: int = field(
        default=REPLY_TOKENS, metadata={"help": "Longest reply to a contrast prompt; judges of harm need 256 or so."}
    )
    base: str | None = field(default=None, metadata={"help": "The model before its safety training, for SafeLoRA."})
    train: int = field(default=320, metadata={"help": "Task samples that are trained on."})
    test: int = field(default=128, metadata={"help": "Task samples that are measured."})
    extraction: int = field(default=192, metadata={"help": "Contrast pairs that directions come from."})
    output: str = field(default="procon-kit", metadata={"help": "Folder for runs and the page."})
    only: str = field(default="", metadata={"help": "Make only runs whose name this regular expression finds."})
    threads: int = field(default=0, metadata={"help": "CPU threads of this process; torch's choice if 0."})
    list: bool = field(default=False, metadata={"help": "Show how many runs are made and which are missing, and stop."})


def main(argv: list[str] | None = None) -> int:
    return run_command("benchmarks.kit", KitArguments, run_kit, argv)


def run_kit(arguments: KitArguments) -> None:
    """Make every missing run, and the page."""
    size = Size(
        train=arguments.train,
        test=arguments.test,
        prompts=arguments.max_prompts,
        extraction=arguments.extraction,
        pairs=min(64, arguments.extraction),
    )
    budget = kit_budget(
        arguments.methods.split(","),
        arguments.tasks.split(","),
        _numbers("poison", arguments.poison, int),
        _numbers("lengths", arguments.lengths, float),
        _numbers("seeds", arguments.seeds, int),
        size,
    )
    folder = Path(arguments.output)
    if not arguments.list:
        keep_to(folder, {name: getattr(arguments, name) for name in QUESTION})

    @cache
    def asked() -> Asked:
        judge = load_judge(arguments.judges) if arguments.judges else None
        return Asked(_prompts(arguments), arguments.reply_tokens, judge)

    def start() -> Start:
        asked()  # what is wrong with prompts and judges shows before a model is measured
        return open_start(
            arguments.model, extraction=size.extraction, pairs=size.pairs, base=arguments.base, work=folder
        )

    make_runs(
        budget.cells(),
        folder / "runs",
        start,
        lambda cell, opened: make_run(cell, opened, budget=budget, runs=folder / "runs", asked=asked()),
        only=arguments.only,
        threads=arguments.threads,
        listed=arguments.list,
    )
    if not arguments.list:
        print(write_page(arguments, budget, folder))


def keep_to(folder: Path, question: dict[str, Any]) -> None:
    """Write down what the runs of a folder are about; ProConError if it has runs of another question."""
    path = folder / "question.json"
    if not path.is_file():
        save_json(question, path)
        return
    known = load_json(path, dict, "question")
    changed = [f"{name} {known.get(name)!r:.60}" for name, value in question.items() if known.get(name) != value]
    if changed:
        raise ProConError(
            f"{str(folder)!r} has runs of {', '.join(changed)}: give these settings again, or another --output"
        )


def _prompts(arguments: KitArguments) -> ContrastPrompts:
    if arguments.prompts is None:
        return builtin_prompts("held_out").first(arguments.max_prompts)
    return load_prompt_sets(arguments.prompts, most=arguments.max_prompts)[0]


def _numbers(name: str, text: str, kind: type) -> list:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise ProConError(f"{name} is {text!r:.60}: give numbers, joined by commas") from None


if __name__ == "__main__":
    sys.exit(main())
