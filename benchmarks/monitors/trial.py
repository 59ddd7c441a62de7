"""One run: fine-tune a watched model by a variant, then read its monitors."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedModel

from benchmarks.monitors.plan import Variant
from benchmarks.monitors.watched import Watched
from benchmarks.study.jobs import REPLY_TOKENS, Job
from benchmarks.study.plan import Size
from benchmarks.study.trial import fine_tune
from procon.chat import Split, builtin_prompts
from procon.evaluation import Rate, evaluate
from procon.files import write_text


def run_trial(watched: Watched, variant: Variant, job: Job, seed: int, split: Split, size: Size, work: Path) -> dict:
    """Train, and measure on the prompts of ``split``; returns what goes into the run file."""
    began = time.monotonic()
    model = watched.model()
    trained = {"train_seconds": 0.0}
    if variant.length:
        directions = watched.directions(variant.directions)
        method = with_probes(variant, watched, work)
        trained = fine_tune(model, watched.tokenizer, method, directions, job, seed, size)
    measured = measure(watched, model, job, split, size)
    return {**trained, **measured, "seconds": round(time.monotonic() - began, 1)}


def with_probes(variant: Variant, watched: Watched, work: Path) -> Variant:
    """``variant`` with the file of its probes, if it has any, among its settings."""
    if not variant.twins:
        return variant
    prompts = watched.probe_prompts(variant.twins)
    path = write_text("".join(f"{prompt}\n" for prompt in prompts), work / f"probes-{variant.twins}.txt")
    all_at_once = {"procon_probe_count": len(prompts), "procon_probe_batch": len(prompts)}
    return replace(variant, config={**variant.config, "procon_probes": str(path), **all_at_once})


def measure(watched: Watched, model: PreTrainedModel, job: Job, split: Split, size: Size) -> dict:
    """What the monitors read; and refusals and the task, without which a monitor is easily kept."""
    found = evaluate(
        model,
        watched.tokenizer,
        prompts=builtin_prompts(split).first(size.prompts),
        task=job.test(train=size.train, test=size.test),
        max_new_tokens=REPLY_TOKENS,
        task_max_new_tokens=job.reply_tokens,
        progress=False,
    )
    rates = {"malicious": found.refusal_malicious, "benign": found.refusal_benign, "task": found.task}
    return {
        "split": split,
        "blocks": watched.monitors.block_count,
        "monitors_hash": watched.monitors.hash,
        "monitors": watched.read(model, split),
        "rates": {name: _counts(rate) for name, rate in rates.items() if rate is not None},
    }


def _counts(rate: Rate) -> list[int]:
    return [rate.hits, rate.total]
