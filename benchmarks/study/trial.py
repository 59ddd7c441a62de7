"""One run: fine-tune by a method, on a job, with a seed; then measure."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, set_seed

from benchmarks.study.defences import build_trainer
from benchmarks.study.displacement import measure_displacement
from benchmarks.study.earlier_settings import settings_now
from benchmarks.study.fresh import fresh_prompts
from benchmarks.study.jobs import Job, safety_samples
from benchmarks.study.memory import peak_memory
from benchmarks.study.methods import Method, choose_directions
from benchmarks.study.missing import summary
from benchmarks.study.plan import Budget, Size
from benchmarks.study.poison import complies
from benchmarks.study.record import Cell, save_run
from benchmarks.study.refusal_odds import refusal_log_odds
from benchmarks.study.reply_logits import reply_logits
from benchmarks.study.start import Start, contrast_means
from procon.chat import ContrastPrompts, Split, builtin_prompts
from procon.data import padding_collator, tokenize_conversations
from procon.directions import Directions
from procon.evaluation import Evaluation, Judge, compare_means, evaluate
from procon.settings import PAPER_RECIPE
from procon.training import ProConConfig

#: The same for all methods, unless one says otherwise: the constraint of the paper keeps training tokens alone, and
#: eight probes run together where there are any.
RECIPE = {
    "procon_anchors": "recorded",
    "procon_probe_hold": "projections",
    "procon_probe_count": 8,
    "procon_probe_batch": 128,
    "procon_probe_weight": 50.0,
    "per_device_train_batch_size": 8,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 5,
    "logging_steps": 5,
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
}


class Asked(NamedTuple):
    """What a model is asked in place of the built-in prompts of a split, and who judges its replies."""

    prompts: ContrastPrompts
    reply_tokens: int
    judge: Sequence[Judge] | None = None


def run_trial(
    start: Start, method: Method, job: Job, seed: int, split: Split, size: Size, asked: Asked | None = None
) -> dict:
    """Train, and measure on the contrast prompts of ``split``, or ``asked``; returns what goes into the run file."""
    began = time.monotonic()
    model = start.model()
    trained = _train(start, model, method, job, seed, size) if method.length else {"train_seconds": 0.0}
    measured = measure(start, model, job, split, size, asked)
    problems = {"problems": size.problems_hash(job, split)}
    return {**trained, **measured, **problems, "seconds": round(time.monotonic() - began, 1)}


def make_run(cell: Cell, start: Start, *, budget: Budget, runs: Path, asked: Asked | None = None) -> str:
    """Make a cell's run and write its file; returns a line on it."""
    method = budget.method(cell)
    run = run_trial(start, method, budget.job(cell), cell.seed, cell.split, budget.size, asked)
    save_run(cell, asdict(method), run, runs)
    return summary(cell, run)


def _train(start: Start, model: PreTrainedModel, method: Method, job: Job, seed: int, size: Size) -> dict:
    """Fine-tune ``model`` itself."""
    directions = choose_directions(method, start)
    return fine_tune(model, start.tokenizer, method, directions, job, seed, size, base=start.base)


def fine_tune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    method: Method,
    directions: Directions,
    job: Job,
    seed: int,
    size: Size,
    *,
    base: str | Path | None = None,
) -> dict:
    """Train ``model`` itself by the recipe that all methods share; returns what it took."""
    dtype = model.dtype
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(model, tokenizer, method, directions, job, seed, size, folder, base=base)
        with peak_memory() as peak:
            began = time.monotonic()
            trainer.train()
            seconds, peak_mb = time.monotonic() - began, peak()
    if not method.adapter:
        model.to(dtype)
    return {
        "samples": len(trainer.train_dataset),
        "steps": trainer.state.global_step,
        "train_seconds": round(seconds, 1),
        "peak_memory_mb": peak_mb,
        "history": [_rounded(row) for row in trainer.state.log_history if "loss" in row],
    }


def make_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    method: Method,
    directions: Directions,
    job: Job,
    seed: int,
    size: Size,
    folder: str,
    *,
    base: str | Path | None = None,
    **settings: Any,
) -> Trainer:
    """The trainer of a method, by the recipe, except for ``settings``.

    ``model`` then has an adapter; or, if all weights are trained, they are in float32, as small steps of an optimiser
    would be rounded away in less, and forwards compute in the dtype that they had.
    """
    conversations = job.conversations(
        train=size.train,
        poisoned=size.poisoned,
        safety=(size.safety if method.samples is None else method.samples) if method.safety else 0,
        seed=seed,
        styled=method.styled,
    )
    dataset = tokenize_conversations(conversations, tokenizer)
    set_seed(seed)
    config = {**RECIPE, "num_train_epochs": size.epochs * method.length, **method.arguments, **settings}
    if method.adapter:
        tuned = get_peft_model(model, adapter(model))
    else:
        config |= {"bf16": model.dtype == torch.bfloat16, "use_cpu": not torch.cuda.is_available()}
        tuned = model.float()
    return build_trainer(
        method.defence,
        tuned,
        ProConConfig(output_dir=folder, seed=seed, **settings_now(config, folder)),
        settings=method.settings,
        directions=directions,
        alignment_dataset=tokenize_conversations(safety_samples(), tokenizer),
        base=base,
        train_dataset=dataset,
        data_collator=reply_logits(padding_collator(tokenizer), model),
        processing_class=tokenizer,
    )


def adapter(model: PreTrainedModel) -> LoraConfig:
    """The paper's adapter, on queries, keys, values and outputs; if they have other names, PEFT's for the family."""
    modules = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    lora = PAPER_RECIPE.lora()
    return LoraConfig(**lora if modules.issuperset(PAPER_RECIPE.lora_targets) else {**lora, "target_modules": None})


def measure(
    start: Start, model: PreTrainedModel, job: Job, split: Split, size: Size, asked: Asked | None = None
) -> dict:
    """Replies, log-odds, drift, displacement and perplexity of a model that came from ``start``."""
    tokenizer = start.tokenizer
    asked = asked or Asked(builtin_prompts(split).first(size.prompts), job.contrast_tokens)
    prompts = asked.prompts
    found = evaluate(
        model,
        tokenizer,
        prompts=prompts,
        judge=asked.judge,
        task=size.problems(job, split),
        max_new_tokens=asked.reply_tokens,
        task_max_new_tokens=job.reply_tokens,
        metric=job.metric,
        progress=False,
    )
    replies = _by_kind(found)
    _add_log_odds(start, model, prompts, replies)
    if size.fresh:
        fresh = _fresh_replies(start, model, size.fresh, job.contrast_tokens)
        replies |= {f"fresh_{kind}": rows for kind, rows in fresh.items()}
    if job.poison is not None:
        for reply in (*replies["malicious"], *replies.get("fresh_malicious", ())):
            reply["complied"] = complies(reply["reply"])
    states = start.probe_states(model)
    drift = compare_means(start.reference, contrast_means(states))
    displacement = measure_displacement(start.states, states, start.directions.at_block_inputs)
    return {
        "split": split,
        "hidden_size": states.shape[-1],
        "replies": replies,
        "perplexity": round(perplexity(model, tokenizer, neutral_texts()), 3),
        "drift": {name: _list(values) for name, values in vars(drift).items()},
        "displacement": {name: _list(values) for name, values in vars(displacement).items()},
    }


def _fresh_replies(start: Start, model: PreTrainedModel, count: int, tokens: int) -> dict[str, list[dict]]:
    prompts = fresh_prompts().first(count)
    found = evaluate(model, start.tokenizer, prompts=prompts, max_new_tokens=tokens, progress=False)
    replies = _by_kind(found)
    _add_log_odds(start, model, prompts, replies)
    return replies


def _add_log_odds(
    start: Start, model: PreTrainedModel, prompts: ContrastPrompts, replies: dict[str, list[dict]]
) -> None:
    odds = refusal_log_odds(model, start.tokenizer, start.tokens, prompts.malicious).tolist()
    for reply, value in zip(replies["malicious"], odds, strict=True):
        reply["log_odds"] = round(value, 3)


def _by_kind(found: Evaluation) -> dict[str, list[dict]]:
    """The replies of each kind, in the order of their prompts, which are not repeated in every run file."""
    kept = ("reply", "refused", "degenerate", "correct")
    kinds: dict[str, list[dict]] = {}
    for reply in found.replies:
        if "mark" in reply:  # of a graded metric, 0 to 1
            reply = {**reply, "correct": reply["mark"]}
        kinds.setdefault(reply["kind"], []).append({key: reply[key] for key in kept if key in reply})
    return kinds


def perplexity(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> float:
    """``exp`` of the mean negative log-likelihood per token of plain texts, without a chat template."""
    loss, tokens = 0.0, 0
    model.eval()
    with torch.no_grad():
        for text in texts:
            ids = torch.tensor([tokenizer(text)["input_ids"]], device=model.device)
            n = ids.shape[1] - 1
            loss += float(model(input_ids=ids, labels=ids).loss) * n
            tokens += n
    return math.exp(loss / tokens)


def neutral_texts() -> list[str]:
    """Paragraphs on everyday matters, written for the study."""
    return files("benchmarks.study").joinpath("neutral.txt").read_text(encoding="utf-8").strip().split("\n\n")


def _list(values: Tensor) -> list[float | None]:
    return [None if math.isnan(value) else round(value, 4) for value in values.tolist()]


def _rounded(row: dict) -> dict:
    return {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in row.items()}
