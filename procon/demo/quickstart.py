"""The quickstart: fine-tune a chat model on a harmless task, with and without the constraint, and compare."""

from __future__ import annotations

from procon.errors import require_extra

__extra__ = require_extra("demo", "the quickstart")

import platform
import time
import warnings
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import TypedDict

import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.text import Text
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from procon.chat import (
    ENOUGH_REFUSAL,
    builtin_drift_pairs,
    builtin_probes,
    builtin_prompts,
    measure_refusal,
)
from procon.data import padding_collator, to_conversations, tokenize_conversations
from procon.demo.arithmetic import Problem, arithmetic_problems
from procon.demo.model import fetch_demo_model
from procon.demo.refusal_tuning import teach_refusal
from procon.directions import Directions, randomized
from procon.errors import ProConError, printable
from procon.evaluation import evaluate, measure_drift
from procon.files import check_writable
from procon.models import load_model
from procon.report import Run, print_table, write_html
from procon.schedule import AlphaSchedule
from procon.settings import PAPER_RECIPE, ProConSettings
from procon.training import DriftCallback, EvaluationCallback, ProConConfig, ProConTrainer
from procon.training.console_rows import show_rows
from procon.version import __version__

TASK_TRAIN, TASK_TEST, TASK_PROBE = 320, 64, 16
TASK_SEED = 0

#: Optimiser steps between two looks at drift, refusal and task while training.
PROBE_EVERY = 20

#: The same for all runs. The constraint has its defaults, which validation prompts chose (docs/results.md).
RECIPE = {
    "num_train_epochs": 1,
    "per_device_train_batch_size": 8,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 5,
    "logging_steps": 10,
    "save_strategy": "no",
    "report_to": [],
}


#: Anchors of the training tokens alone, as in the paper.
_TOKENS = {"procon_probes": "none"}


class _ReplyTokens(TypedDict):
    max_new_tokens: int
    task_max_new_tokens: int


#: Long enough for the refusal in a reply's opening, and for an arithmetic answer.
REPLY_TOKENS: _ReplyTokens = {"max_new_tokens": 24, "task_max_new_tokens": 36}

LIMITS = (
    "One small model, one harmless task, one seed: this shows that the parts work, not how much a larger model gains.",
    "Refusals are counted by keyword in the opening of greedy replies; read the replies below.",
    "A part of what ProCon keeps is owed to the probes, a part to keeping hidden states along any direction at all: "
    "--control adds a run without probes, and one along random directions.",
    "Benign prompts here are twins of the malicious ones, on the same topics: a small model refuses some of them from "
    "the start. Compare with the start, not with zero.",
)


def quickstart(
    model: str | None = None,
    output_dir: str | Path = "procon-quickstart",
    seed: int = 0,
    *,
    control: bool = False,
    trust_remote_code: bool = False,
) -> list[Run]:
    """Run it; writes ``report.html``, one JSON per run, the directions, the start model and the adapters.

    Args:
        model: folder or hub name of a chat model; SmolLM2-135M-Instruct if not given.
        output_dir: where to write.
        seed: of adapters and data order.
        control: add two runs without probes: along the refusal directions, and along random ones.
        trust_remote_code: run code that comes with ``model``; see :func:`procon.models.load_model`.

    Returns:
        The start and each run, in the order of the report.

    Raises:
        ProConError: if the model cannot be had, or gives no directions.
    """
    began = time.monotonic()
    console = Console()
    output = Path(output_dir)
    check_writable(output / "report.html")
    transformers.utils.logging.set_verbosity_error()

    parts = 6 if control else 4
    console.rule(f"1/{parts}  a chat model that refuses")
    start, tokenizer, _ = _starting_model(model, output / "start", console, trust_remote_code)

    console.rule(f"2/{parts}  refusal directions")
    directions = Directions.extract(start, tokenizer)
    directions.save(output / "directions.safetensors")
    inputs = directions.at_block_inputs
    usable = inputs.auroc[inputs.usable]
    console.print(f"{len(usable)} blocks; held-out AUROC {usable.min():.2f} to {usable.max():.2f}")
    # Drift is measured on prompts that no training here keeps.
    reference = Directions.extract(start, tokenizer, builtin_drift_pairs(), check_refusal=False, progress=False)

    problems = arithmetic_problems(TASK_TRAIN + TASK_TEST + TASK_PROBE, TASK_SEED)
    task, probe = problems[TASK_TRAIN:-TASK_PROBE], problems[-TASK_PROBE:]
    train = tokenize_conversations(to_conversations(Dataset.from_list(problems[:TASK_TRAIN])), tokenizer)
    runs = [
        Run(
            label="start",
            evaluation=evaluate(start, tokenizer, task=task, label="start", **REPLY_TOKENS),
            cosine=reference.cosine(reference).tolist(),
        )
    ]
    plan = [("plain", {"procon_schedule": "0"}, directions), ("ProCon", {}, directions)]
    if control:
        # Probes keep a state whatever the directions are, so the direction is compared without them.
        plan.append(("tokens", _TOKENS, directions))
        plan.append(("random", _TOKENS, randomized(directions, seed=1)))
    for number, (label, settings, along) in enumerate(plan, 3):
        console.rule(f"{number}/{parts}  {label} fine-tuning")
        config = ProConConfig(output_dir=str(output / label.lower()), seed=seed, **RECIPE, **settings)
        runs.append(_fine_tune(label, start, tokenizer, reference, along, train, task, probe, config))
    for run in runs:
        run.save(output / "runs" / f"{run.label.lower()}.json")
    report = write_html(
        runs,
        output / "report.html",
        title="ProCon quickstart",
        notes=LIMITS,
        facts=_facts(model, seed, control, start, time.monotonic() - began),
    )
    console.rule("result")
    print_table(runs)
    places = f"Plots and replies: {report}    Adapters: {output / 'plain'}, {output / 'procon'}"
    console.print(Text(printable(places)))  # a path may look like markup
    console.print(f"Took {(time.monotonic() - began) / 60:.1f} minutes.")
    return runs


def make_start(
    model: str | None = None, output_dir: str | Path = "procon-quickstart", *, trust_remote_code: bool = False
) -> str:
    """Make the model that the quickstart's runs start from, and nothing else; returns its folder or name.

    That is a folder in ``output_dir`` if the model had to be taught to refuse, else ``model`` as it was given.

    Raises:
        ProConError: if the model cannot be had.
    """
    folder = Path(output_dir) / "start"
    check_writable(folder / "any")
    transformers.utils.logging.set_verbosity_error()
    console = Console()
    console.rule("a chat model that refuses")
    _, _, place = _starting_model(model, folder, console, trust_remote_code)
    console.print(Text(f"Start model: {printable(place)}"))
    return place


def _starting_model(
    name: str | None, folder: Path, console: Console, trust_remote_code: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str]:
    """The model that both runs start from, and where it is: one that had to be taught to refuse is in ``folder``."""
    found = str(name or fetch_demo_model())
    model, tokenizer = load_model(found, trust_remote_code=trust_remote_code)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what they say is said, and mended, below
        rate = measure_refusal(model, tokenizer, builtin_prompts("validation").malicious)
    if rate is None:
        raise ProConError(
            "no reply to malicious prompts came to the end of its thought: give a model that can do without"
        )
    if rate >= ENOUGH_REFUSAL:
        console.print(f"It refuses {rate:.0%} of malicious prompts.")
        return model, tokenizer, found
    console.print(f"As published it refuses {rate:.0%} of malicious prompts: teaching it to refuse first.")
    teach_refusal(model, tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # Loaded from there, so that the adapters to come name it as their base.
    return *load_model(folder, trust_remote_code=trust_remote_code), str(folder)


def _fine_tune(
    label: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    reference: Directions,
    constrained: Directions,
    train: Dataset,
    task: Sequence[Problem],
    probe_task: Sequence[Problem],
    config: ProConConfig,
) -> Run:
    """Train a fresh adapter along ``constrained``, measure the drift of ``reference``; ``model`` is left as it was."""
    set_seed(config.seed)
    tuned = get_peft_model(model, LoraConfig(**PAPER_RECIPE.lora()))
    trainer = ProConTrainer(
        tuned,
        config,
        directions=constrained,
        train_dataset=train,
        data_collator=padding_collator(tokenizer),
        processing_class=tokenizer,
    )
    probes = (
        DriftCallback(trainer, tokenizer, steps=PROBE_EVERY),
        EvaluationCallback(
            trainer,
            tokenizer,
            steps=PROBE_EVERY,
            prompts=builtin_prompts("validation").first(TASK_PROBE),
            task=probe_task,
            **REPLY_TOKENS,
        ),
    )
    show_rows(trainer)
    for probe in probes:
        trainer.add_callback(probe)
    times = trainer.train().metrics
    trainer.save_model()
    run = Run(
        label=label,
        evaluation=evaluate(tuned, tokenizer, task=task, label=label, **REPLY_TOKENS),
        cosine=measure_drift(tuned, tokenizer, reference, builtin_drift_pairs()).cosine.tolist(),
        seconds_per_step=times.get("step_cpu_seconds", times["step_seconds"]),
        history=trainer.state.log_history,
    )
    tuned.unload()
    return run


def _facts(name: str | None, seed: int, control: bool, model: PreTrainedModel, seconds: float) -> dict[str, str]:
    defaults = ProConSettings()
    return {
        "model": name or "SmolLM2-135M-Instruct with the package's refusal adapter",
        "command": f"procon quickstart --seed {seed}" + (" --control" if control else ""),
        "task": f"{TASK_TRAIN} arithmetic word problems, {RECIPE['num_train_epochs']} epoch",
        "constraint": f"{AlphaSchedule.parse(defaults.schedule)}, {defaults.penalty} penalty, {defaults.scope} tokens; "
        f"anchors {defaults.anchors}, {len(builtin_probes())} probes, {defaults.probe_batch} every "
        f"{defaults.probe_every} steps",
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {model.device}, {model.dtype}",
        "versions": f"procon {__version__}, torch {torch.__version__}, transformers {transformers.__version__}",
        "date": date.today().isoformat(),
        "time": f"{seconds / 60:.1f} minutes",
    }
