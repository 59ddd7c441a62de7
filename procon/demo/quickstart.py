"""The quickstart: fine-tune a chat model on a harmless task, with and without the constraint, and compare."""

from __future__ import annotations

from procon.errors import require_extra

__extra__ = require_extra("demo", "the quickstart")

import platform
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.text import Text
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, TrainerCallback, set_seed

from procon.chat import builtin_drift_pairs, builtin_prompts
from procon.data import padding_collator, to_conversations, tokenize_conversations
from procon.demo.arithmetic import Problem, arithmetic_problems
from procon.demo.model import fetch_demo_model, teach_refusal
from procon.directions import Directions, randomized
from procon.errors import printable
from procon.evaluation import Evaluation, evaluate
from procon.files import check_writable
from procon.models import load_model
from procon.report import Run, print_table, write_html
from procon.settings import PAPER_RECIPE
from procon.training import DriftCallback, EvaluationCallback, ProConConfig, ProConTrainer
from procon.version import __version__


class Size(NamedTuple):
    """How much is trained and measured."""

    train: int  # problems
    batch: int  # of them in a step
    test: int  # problems
    prompts: int  # malicious ones, and as many benign
    watched: int = 0  # prompts and problems of each look at refusal and task while training
    drift_pairs: int = 0
    every: int = 0  # steps between two looks, and between two at drift


#: What shows the difference, and what has narrower intervals and the course of training too.
QUICK = Size(train=240, batch=6, test=40, prompts=32)
FULL = Size(train=320, batch=8, test=64, prompts=64, watched=16, drift_pairs=64, every=20)

#: The same for all runs. The constraint has its defaults, which validation prompts chose (docs/results.md).
RECIPE = {
    "num_train_epochs": 1,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 5,
    "logging_steps": 10,
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}

#: Long enough for the refusal in a reply's opening, and for an arithmetic answer.
REPLY_TOKENS: dict[str, Any] = {"max_new_tokens": 24, "task_max_new_tokens": 36}

LIMITS = (
    "One small model, one harmless task, one seed: this shows that the parts work, not how much a larger model gains.",
    "Refusals are counted by keyword in the opening of greedy replies; read the replies above.",
    "Benign prompts here are twins of the malicious ones, on the same topics: a small model refuses some of them from "
    "the start. Compare with the start, not with zero.",
)


def quickstart(
    model: str | None = None,
    output_dir: str | Path = "procon-quickstart",
    seed: int = 0,
    *,
    full: bool = False,
    control: bool = False,
    trust_remote_code: bool = False,
) -> list[Run]:
    """Run it; writes ``report.html``, the starting model, and a folder for each run.

    Args:
        model: folder or hub name of a chat model; SmolLM2-135M-Instruct if not given.
        output_dir: where to write.
        seed: of adapters and data order.
        full: train longer, measure on more prompts and problems, and while training too, drift among it.
        control: add two runs by the paper's method: along the refusal directions, which are written too, and along
            random ones.
        trust_remote_code: run code that comes with ``model``; see :func:`procon.models.load_model`.

    Returns:
        The start and each run, in the order of the report.

    Raises:
        ProConError: if the model cannot be had, or gives no directions for the control.
    """
    began = time.monotonic()
    console = Console()
    output = Path(output_dir)
    check_writable(output / "report.html")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    disable_progress_bars()
    size = FULL if full else QUICK

    parts = 6 if control else 3
    console.rule(f"1/{parts}  a chat model that refuses")
    place = make_start(model, output)
    start, tokenizer = load_model(place, trust_remote_code=trust_remote_code)

    with console.status(f"about {4 + 3 * full + 4 * control} minutes on two cores"):
        problems = arithmetic_problems(size.train + size.test + size.watched, seed=0)
        train = tokenize_conversations(to_conversations(Dataset.from_list(problems[: size.train])), tokenizer)
        measured = _Measured(problems[size.train : size.train + size.test], problems[size.train + size.test :], size)
        evaluation = measured.evaluate(start, tokenizer, "start")
        evaluation.save(output / "start.json")
        console.print(f"the model refuses {evaluation.refusal_malicious} of malicious prompts")
        runs = [Run("start", evaluation)]
        plan: list[tuple[str, dict[str, Any], Directions | None]]
        plan = [("plain", {"procon_schedule": "0"}, None), ("ProCon", {}, None)]
        if control:
            console.rule(f"2/{parts}  refusal directions")
            directions = Directions.extract(start, tokenizer, progress=False)
            directions.save(output / "directions.safetensors")
            usable = directions.auroc[directions.usable]
            console.print(f"{len(usable)} blocks; held-out AUROC {usable.min():.2f} to {usable.max():.2f}")
            for name, along in {"tokens": directions, "random": randomized(directions, seed=1)}.items():
                plan.append((name, {"procon_terms": "tokens"}, along))
        for number, (label, settings, along) in enumerate(plan, parts + 1 - len(plan)):
            console.rule(f"{number}/{parts}  {label} fine-tuning")
            folder, recipe = str(output / label.lower()), RECIPE | {"per_device_train_batch_size": size.batch}
            config = ProConConfig(output_dir=folder, seed=seed, **recipe, **settings)
            runs.append(_fine_tune(label, start, tokenizer, along, train, measured, config, console))
    report = write_html(
        runs,
        output / "report.html",
        title="ProCon quickstart",
        notes=LIMITS,
        facts={
            "command": f"procon quickstart --seed {seed}" + " --full" * full + " --control" * control,
            "model": model or "SmolLM2-135M-Instruct with the package's refusal adapter",
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {start.device}, {start.dtype}",
            "versions": f"procon {__version__}, torch {torch.__version__}, transformers {transformers.__version__}",
            "made": f"{date.today().isoformat()}, in {(time.monotonic() - began) / 60:.1f} minutes",
        },
    )
    console.rule("result")
    print_table(runs)
    places = f"Plots and replies: {report}    Adapters: {output / 'plain'}, {output / 'procon'}"
    console.print(Text(printable(places)))  # a path may look like markup
    console.print(f"Took {(time.monotonic() - began) / 60:.1f} minutes.")
    return runs


def make_start(model: str | None = None, output_dir: str | Path = "procon-quickstart") -> str:
    """The model that the quickstart's runs start from: ``model`` as it was given, or a folder.

    That is in ``output_dir``, and has the demo model, taught to refuse.

    Raises:
        ProConError: if the demo model cannot be had.
    """
    if model is not None:
        return model
    folder = Path(output_dir) / "start"
    check_writable(folder / "any")
    found, tokenizer = load_model(fetch_demo_model())
    teach_refusal(found).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


class _Measured(NamedTuple):
    """What runs are measured on: problems at the end, problems while they train, and how many of all."""

    task: Sequence[Problem]
    watched: Sequence[Problem]
    size: Size

    def evaluate(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, label: str) -> Evaluation:
        prompts = builtin_prompts("held_out").first(self.size.prompts)
        asked = {"prompts": prompts, "task": self.task, "label": label, "progress": False}
        return evaluate(model, tokenizer, **asked, **REPLY_TOKENS)


class _Lines(TrainerCallback):
    """A line for each loss that is logged."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            penalty = f", penalty {logs['procon/penalty']:.2f}" if "procon/penalty" in logs else ""
            self._console.print(f"step {state.global_step} of {state.max_steps}: loss {logs['loss']:.2f}{penalty}")


def _fine_tune(
    label: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    directions: Directions | None,
    train: Dataset,
    measured: _Measured,
    config: ProConConfig,
    console: Console,
) -> Run:
    """Train a fresh adapter, along ``directions`` if there are any, and measure; ``model`` is left as it was."""
    set_seed(config.seed)
    tuned = get_peft_model(model, LoraConfig(**PAPER_RECIPE.lora()))
    trainer = ProConTrainer(
        tuned,
        config,
        directions=directions,
        train_dataset=train,
        data_collator=padding_collator(tokenizer),
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_Lines(console))
    size, callbacks = measured.size, list[DriftCallback | EvaluationCallback]()
    if size.every:
        # On prompts that no training here keeps.
        pairs = builtin_drift_pairs().first(size.drift_pairs)
        asked = {"prompts": builtin_prompts("validation").first(size.watched), "task": measured.watched}
        callbacks.append(DriftCallback(trainer, tokenizer, steps=size.every, prompts=pairs))
        callbacks.append(EvaluationCallback(trainer, tokenizer, steps=size.every, **asked, **REPLY_TOKENS))
    for callback in callbacks:
        trainer.add_callback(callback)
    seconds = trainer.train().metrics["train_runtime"] - sum(callback.seconds for callback in callbacks)
    trainer.save_model()
    trainer.save_state()
    evaluation = measured.evaluate(tuned, tokenizer, label)
    evaluation.save(Path(config.output_dir or "") / "evaluation.json")
    tuned.unload()
    return Run(
        label=label,
        evaluation=evaluation,
        seconds_per_step=seconds / trainer.state.global_step,
        history=trainer.state.log_history,
    )
