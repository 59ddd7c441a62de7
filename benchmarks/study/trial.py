"""One run: fine-tune by a method, in a setting, with a seed; then measure."""

from __future__ import annotations

import math
import resource
import tempfile
import time
from collections.abc import Sequence
from importlib.resources import files

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from benchmarks.study.methods import Method, choose_directions
from benchmarks.study.settings import Setting
from benchmarks.study.start import Start, probe_prompts
from procon.data import padding_collator, tokenize_conversations
from procon.displacement import last_token_states, measure_displacement
from procon.drift import measure_drift
from procon.evaluation import Evaluation, evaluate
from procon.prompts import ContrastPrompts, builtin_prompts
from procon.refusal_odds import refusal_log_odds
from procon.refusal_tuning import LORA
from procon.training import ProConConfig, ProConTrainer

#: The same for all methods.
RECIPE = {
    "procon_schedule": "0",
    "per_device_train_batch_size": 8,
    "learning_rate": 5e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 5,
    "logging_steps": 5,
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
}

#: Safety samples where a method mixes them in: 5% of the training data (paper: 1,000 of 17,659, 6%).
SAFETY_SAMPLES = 16
REPLY_TOKENS = 24


def run_trial(start: Start, method: Method, setting: Setting, seed: int) -> dict:
    """Train and measure; what a run file holds."""
    data = setting.conversations(safety_samples=SAFETY_SAMPLES if method.safety else 0, seed=seed)
    dataset = tokenize_conversations(data, start.tokenizer, progress=False)
    set_seed(seed)
    model = get_peft_model(start.model(), LoraConfig(**LORA))
    with tempfile.TemporaryDirectory() as folder:
        config = ProConConfig(
            output_dir=folder, seed=seed, **{**RECIPE, "num_train_epochs": method.length, **method.config}
        )
        trainer = ProConTrainer(
            model,
            config,
            directions=choose_directions(method, start.directions),
            train_dataset=dataset,
            data_collator=padding_collator(start.tokenizer),
        )
        began = time.monotonic()
        trainer.train()
        seconds = time.monotonic() - began
    return {
        "samples": len(dataset),
        "steps": trainer.state.global_step,
        "train_seconds": round(seconds, 1),
        "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "history": [_rounded(row) for row in trainer.state.log_history if "loss" in row],
        **measure(start, model, setting),
    }


def measure(start: Start, model: nn.Module, setting: Setting) -> dict:
    """Replies, log-odds, drift, displacement and perplexity of a model that came from ``start``."""
    tokenizer = start.tokenizer
    held_out, validation = builtin_prompts("held_out"), builtin_prompts("validation")
    found = evaluate(
        model,
        tokenizer,
        prompts=ContrastPrompts((*held_out.malicious, *validation.malicious), held_out.benign),
        task=setting.test(),
        max_new_tokens=REPLY_TOKENS,
        task_max_new_tokens=setting.reply_tokens,
        progress=False,
    )
    odds = {
        name: refusal_log_odds(model, tokenizer, start.tokens, prompts).tolist()
        for name, prompts in (
            ("held_out", held_out.malicious),
            ("validation", validation.malicious),
            ("benign", held_out.benign),
        )
    }
    replies = _by_kind(found)
    n = len(held_out.malicious)
    replies = {
        "held_out": replies["malicious"][:n],
        "validation": replies["malicious"][n:],
        "benign": replies["benign"],
        "task": replies["task"],
    }
    for name, values in odds.items():
        for reply, value in zip(replies[name], values, strict=True):
            reply["log_odds"] = round(value, 3)
    probes = probe_prompts(len(start.states) // 2)
    drift = measure_drift(model, tokenizer, start.reference, probes, progress=False)
    states = last_token_states(model, tokenizer, (*probes.malicious, *probes.benign))
    displacement = measure_displacement(start.states, states, start.directions)
    return {
        "replies": replies,
        "perplexity": round(perplexity(model, tokenizer, neutral_texts()), 3),
        "drift": {name: _list(values) for name, values in vars(drift).items()},
        "displacement": {name: _list(values) for name, values in vars(displacement).items()},
    }


def _by_kind(found: Evaluation) -> dict[str, list[dict]]:
    """The replies of each kind, in the order of their prompts, which are not repeated in every run file."""
    kept = ("reply", "refused", "degenerate", "correct")
    kinds: dict[str, list[dict]] = {}
    for reply in found.replies:
        kinds.setdefault(reply["kind"], []).append({key: reply[key] for key in kept if key in reply})
    return kinds


def perplexity(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> float:
    """``exp`` of the mean negative log-likelihood a token of plain texts, without a chat template."""
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
