"""One run: fine-tune by a method, on a job, with a seed; then measure."""

from __future__ import annotations

import gc
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, set_seed

from benchmarks.study.controls import randomized_within, shuffled
from benchmarks.study.defences import build_trainer
from benchmarks.study.displacement import measure_displacement
from benchmarks.study.fresh import fresh_prompts
from benchmarks.study.jobs import Job, safety_samples
from benchmarks.study.plan import Method, Size
from benchmarks.study.poison import complies
from benchmarks.study.refusal_odds import refusal_log_odds
from benchmarks.study.reply_logits import reply_logits
from benchmarks.study.start import Start, contrast_means
from procon.chat import ContrastPrompts, Split, builtin_probe_pairs, builtin_prompts
from procon.data import own_replies, padding_collator, tokenize_conversations
from procon.directions import Directions, randomized
from procon.evaluation import Evaluation, compare_means, evaluate
from procon.settings import PAPER_RECIPE
from procon.training import ProConConfig

#: The same for all methods, unless one says otherwise: the constraint of the paper keeps training tokens alone.
RECIPE = {
    "procon_terms": "tokens",
    "per_device_train_batch_size": 8,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 5,
    "logging_steps": 5,
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
}

#: The same for all that keep probes, which run together unless one says otherwise.
_PROBES = {"procon_probe_batch": 128, "procon_probe_weight": 50.0, "procon_probe_reply_tokens": 0}


def run_trial(
    start: Start, method: Method, job: Job, seed: int, split: Split, size: Size, kept: Path | None = None
) -> dict:
    """Train, and measure on the contrast prompts of ``split``; returns what a run says of it.

    ``kept`` is the folder that an adapter is saved to.
    """
    began = time.monotonic()
    model = start.model()
    trained: dict = {"train_seconds": 0.0}
    if method.length:
        directions = choose_directions(method, start)
        trained = fine_tune(model, start.tokenizer, method, directions, job, seed, size, kept)
    measured = measure(start, model, job, split, size)
    problems = {"problems": size.problems_hash(job, split)}
    return {**trained, **measured, **problems, "seconds": round(time.monotonic() - began, 1)}


def choose_directions(method: Method, start: Start) -> Directions | None:
    """The directions that ``method`` constrains, None if it keeps probes alone."""
    if method.config.get("procon_terms") == "probes":
        return None
    kind, _, argument = method.directions.partition(":")
    found = start.directions
    if kind == "random":
        return randomized(found, int(argument))
    if kind == "within":
        benign = start.states[len(start.states) // 2 :]  # with the malicious ones, draws would lean towards r
        return randomized_within(found, benign, int(argument))
    if kind == "shuffled":
        return shuffled(found, int(argument))
    return start.extract(int(argument)) if kind == "k" else found


def probes_in_file(config: dict[str, Any], folder: str | Path) -> dict[str, Any]:
    """``config``; if it asks for some of the built-in probes, ``builtin:8``, they are in a file of ``folder``."""
    source, _, count = config.get("procon_probes", "").partition(":")
    if source != "builtin" or not count:
        return config
    file = Path(folder) / "probes.jsonl"
    file.write_text(
        "".join(json.dumps({"instruction": text}) + "\n" for text in builtin_probe_pairs().malicious[: int(count)])
    )
    return {**config, "procon_probes": str(file)}


def fine_tune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    method: Method,
    directions: Directions | None,
    job: Job,
    seed: int,
    size: Size,
    kept: Path | None = None,
) -> dict:
    """Train ``model`` itself by the recipe that all methods share; returns what it took.

    ``kept`` is the folder that an adapter is saved to.
    """
    dtype = model.dtype
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(model, tokenizer, method, directions, job, seed, size, folder)
        with peak_memory() as peak:
            began = time.monotonic()
            trainer.train()
            seconds, peak_mb = time.monotonic() - began, peak()
    if not method.adapter:
        model.to(dtype)
    elif kept:
        trainer.model.save_pretrained(kept)
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
    directions: Directions | None,
    job: Job,
    seed: int,
    size: Size,
    folder: str,
    **settings: Any,
) -> Trainer:
    """The trainer of a method, by the recipe, except for ``settings``.

    ``model`` then has an adapter; or, if all weights are trained, they are in float32, as small steps of an optimiser
    would be rounded away in less, and forwards compute in the dtype that they had.
    """
    samples = own_replies(model, tokenizer, progress=False) if method.own else safety_samples()
    conversations = job.conversations(
        train=size.train,
        poisoned=size.poisoned,
        safety=(size.safety if method.samples is None else method.samples) if method.safety else 0,
        seed=seed,
        samples=job.styled_samples() if method.styled else samples,
    )
    dataset = tokenize_conversations(conversations, tokenizer)
    set_seed(seed)
    probes = _PROBES if "procon_probes" in method.config else {}
    config = {**RECIPE, **probes, "num_train_epochs": size.epochs * method.length, **method.config, **settings}
    if method.adapter:
        tuned = get_peft_model(model, adapter(model))
    else:
        config |= {"bf16": model.dtype == torch.bfloat16, "use_cpu": not torch.cuda.is_available()}
        tuned = model.float()
    return build_trainer(
        method.defence,
        tuned,
        ProConConfig(output_dir=folder, seed=seed, **probes_in_file(config, folder)),
        settings=method.settings,
        directions=directions,
        alignment_dataset=tokenize_conversations(samples, tokenizer),
        train_dataset=dataset,
        data_collator=reply_logits(padding_collator(tokenizer), model),
        processing_class=tokenizer,
    )


@contextmanager
def peak_memory() -> Iterator[Callable[[], int | None]]:
    """Gives a function that returns the peak since then, in MB: of the GPU if there is one, otherwise of the process.

    It returns None if the system does not report the peak.
    """
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        yield lambda: round(torch.cuda.max_memory_allocated() / 2**20)
    elif reset.exists():
        reset.write_text("5")  # sets the high-water mark to what is resident now (proc_pid_clear_refs(5))
        yield lambda: round(int(status.read_text().partition("VmHWM:")[2].split()[0]) / 2**10)
    else:
        yield lambda: None


def adapter(model: PreTrainedModel) -> LoraConfig:
    """The paper's adapter, on queries, keys, values and outputs; if they have other names, PEFT's for the family."""
    modules = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    lora = PAPER_RECIPE.lora()
    return LoraConfig(**lora if modules.issuperset(PAPER_RECIPE.lora_targets) else {**lora, "target_modules": None})


def measure(start: Start, model: PreTrainedModel, job: Job, split: Split, size: Size) -> dict:
    """Replies, log-odds, drift, displacement and perplexity of a model that came from ``start``."""
    tokenizer = start.tokenizer
    prompts = builtin_prompts(split).first(size.prompts)
    found = evaluate(
        model,
        tokenizer,
        prompts=prompts,
        task=size.problems(job, split),
        max_new_tokens=job.contrast_tokens,
        task_max_new_tokens=job.reply_tokens,
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
    displacement = measure_displacement(start.states, states, start.directions)
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
    return files("benchmarks.study").joinpath("texts", "neutral.txt").read_text(encoding="utf-8").strip().split("\n\n")


def _list(values: Tensor) -> list[float | None]:
    return [None if math.isnan(value) else round(value, 4) for value in values.tolist()]


def _rounded(row: dict) -> dict:
    return {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in row.items()}
