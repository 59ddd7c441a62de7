"""One run: train by an algorithm and a method, with a seed; then measure."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace

from peft import get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, set_seed

from benchmarks.preferences.algorithm import Algorithm
from benchmarks.preferences.reward import is_right, score
from benchmarks.study.jobs import JOBS
from benchmarks.study.memory import peak_memory
from benchmarks.study.methods import Method
from benchmarks.study.plan import Size
from benchmarks.study.start import Start
from benchmarks.study.trial import adapter, measure
from procon.chat import Split
from procon.demo import Problem


def run_trial(start: Start, method: Method, algorithm: Algorithm, seed: int, split: Split, size: Size) -> dict:
    """Train, and measure on the contrast prompts of ``split``; returns what goes into the run file."""
    began = time.monotonic()
    task = JOBS["arithmetic"]
    job = replace(
        task, problems=lambda n, seed: algorithm.asked(task.problems(n, seed)), reply_tokens=algorithm.reply_tokens
    )
    held_out = task.test(train=size.train, test=size.test)
    model = start.model()
    trained = _train(start, model, method, algorithm, held_out, seed, size) if method.length else {"train_seconds": 0.0}
    measured = measure(start, model, job, split, size)
    rate(measured["replies"]["task"], held_out, start.tokenizer, algorithm.reply_tokens)
    return {**trained, **measured, "seconds": round(time.monotonic() - began, 1)}


def _train(
    start: Start,
    model: PreTrainedModel,
    method: Method,
    algorithm: Algorithm,
    held_out: Sequence[Problem],
    seed: int,
    size: Size,
) -> dict:
    """Train; ``model`` then has an adapter."""
    problems = JOBS["arithmetic"].test(train=0, test=size.train)
    set_seed(seed)
    tuned = get_peft_model(model, adapter(model))
    with tempfile.TemporaryDirectory() as folder:
        trainer = algorithm.trainer(
            tuned, method, start, train=problems, held_out=held_out, output_dir=folder, seed=seed
        )
        with peak_memory() as peak:
            began = time.monotonic()
            trainer.train()
            seconds, peak_mb = time.monotonic() - began, peak()
        history = algorithm.history(trainer)
        pairs = _held_out_pairs(trainer)
    return {
        "steps": trainer.state.global_step,
        "train_seconds": round(seconds, 1),
        "peak_memory_mb": peak_mb,
        "history": history,
        **pairs,
    }


def _held_out_pairs(trainer: Trainer) -> dict:
    """How well pairs that were not trained on are separated, if there are any."""
    if trainer.eval_dataset is None:
        return {}
    found = trainer.evaluate()
    return {"pairs": {name: round(found[f"eval_rewards/{name}"], 4) for name in ("accuracies", "margins")}}


def rate(replies: Sequence[dict], problems: Sequence[Problem], tokenizer: PreTrainedTokenizerBase, limit: int) -> None:
    """Give each reply to a problem its reward, and count it right by its last number alone.

    A reply of as many tokens as the limit was cut off.
    """
    for reply, problem in zip(replies, problems, strict=True):
        finished = len(tokenizer(reply["reply"], add_special_tokens=False)["input_ids"]) < limit
        reply["correct"] = is_right(reply["reply"], problem["output"])
        reply["reward"] = score(reply["reply"], problem["output"], finished=finished)
