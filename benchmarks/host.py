"""What does Python do in a step? ``python -m benchmarks.host``: a step of ProConTrainer beside the plain Trainer's.

A tiny model (3 blocks) trains in full on two samples of 16 tokens, so that a step is host work alone. The trainings
take turns in one process. Printed are the milliseconds of a step, Python's share, which is what the default takes
more than the plain Trainer less the forward and backward of its probes, and where that goes by function.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import pstats
import tempfile
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.functional import kl_div
from transformers import PreTrainedTokenizerFast, TrainerCallback

from benchmarks.harness.shapes import make_batch, make_model
from benchmarks.harness.trainers import make_trainer
from procon import ProConConfig
from procon.data import padding_collator

ROWS, LENGTH, PROBE_LENGTH = 2, 16, 12
PROBES = "forward and backward of probes"
EVERY = ProConConfig.procon_probe_every
SETTINGS = {"default": {}, "tokens": {"procon_terms": "tokens"}, "both": {"procon_terms": "both"}}


class _Clock(TrainerCallback):
    """CPU seconds of each optimiser step, and a profile of those after the first few."""

    def __init__(self, warmup: int, profile: cProfile.Profile | None) -> None:
        self.warmup, self.profile, self.seconds, self._begun = warmup, profile, [], 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        if self.profile and state.global_step == self.warmup:
            self.profile.enable()
        self._begun = time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(time.process_time() - self._begun)

    def on_train_end(self, args, state, control, **kwargs):
        if self.profile:
            self.profile.disable()


def step_seconds(kind: str, folder: str, steps: int = 120, warmup: int = 8, profile: cProfile.Profile | None = None):
    """CPU seconds of a step: of ``"plain"``, or of a set of the method's settings.

    The median of each place in the turn of the probes, and their mean: a busy machine moves the mean of all by more
    than what is looked for.
    """
    torch.set_num_threads(1)
    clock, tokenizer = _Clock(warmup, profile), _tokenizer()
    trainer = make_trainer(
        None if kind == "plain" else SETTINGS[kind],
        make_model("smoke", torch.float32, "full"),
        make_batch("smoke", ROWS, LENGTH, packed=False),
        tokenizer,
        padding_collator(tokenizer),
        folder,
        callbacks=[clock],
        max_steps=steps,
        logging_strategy="no",
        use_cpu=True,
    )
    gc.collect()
    trainer.train()
    timed = clock.seconds[warmup:]
    return sum(median(timed[place::EVERY]) for place in range(EVERY)) / EVERY


def probe_seconds(steps: int = 120, warmup: int = 8, profile: cProfile.Profile | None = None) -> float:
    """CPU seconds a step of the forward and backward of the default's probes, as torch alone makes them."""
    torch.set_num_threads(1)
    model, settings = make_model("smoke", torch.float32, "full"), ProConConfig(use_cpu=True)
    reply = settings.procon_probe_reply_tokens
    ids = torch.ones(settings.procon_probe_batch, PROBE_LENGTH + reply, dtype=torch.long)
    forward = partial(model, input_ids=ids, attention_mask=torch.ones_like(ids), logits_to_keep=reply + 1)
    with torch.no_grad():
        start = forward().logits.log_softmax(-1)
    timed = []
    for step in range(steps):
        if profile and step == warmup:
            profile.enable()
        begun = time.process_time()
        now = forward().logits.log_softmax(-1)
        kl_div(now, start, reduction="none", log_target=True).sum(-1).mean().backward()
        timed.append(time.process_time() - begun)
    if profile:
        profile.disable()
    return median(timed[warmup:]) / EVERY


def calls(kind: str, folder: str, steps: int = 24, warmup: int = 8) -> float:
    """Function calls of a step, Python's and those into C, by a profile: the same in each run, on any machine."""
    profile = cProfile.Profile()
    every = 1
    if kind == "probes":
        probe_seconds(steps + warmup, warmup, profile)
        every = EVERY
    else:
        step_seconds(kind, folder, steps + warmup, warmup, profile)
    return pstats.Stats(profile).total_calls / steps / every


def share(measure: Callable[[str, str], float], folder: str) -> float:
    """What is Python's of a step: what the default has beyond the plain Trainer's and its probes'."""
    constrained, plain, probes = (measure(kind, folder) for kind in ("default", "plain", "probes"))
    return constrained - plain - probes


def _tokenizer() -> PreTrainedTokenizerFast:
    """Of twelve words a probe."""
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<end>": 1}, "<end>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    return tokenizer


def main(argv: list[str] | None = None) -> None:
    """Print the times of a step and a profile."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--functions", type=int, default=25, help="of the profile")
    chosen = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        names = ("plain", *SETTINGS)
        found: dict[str, list[float]] = {name: [] for name in (*names, PROBES)}
        for _ in range(chosen.rounds):
            for name in names:
                found[name].append(step_seconds(name, folder))
            found[PROBES].append(probe_seconds())
        for name, timed in found.items():
            ratios = [one / plain for one, plain in zip(timed, found["plain"], strict=True)]
            print(f"{name:32} {1e3 * median(timed):7.2f} ms a step, {median(ratios):.2f} of plain")
        timed = zip(found["default"], found["plain"], found[PROBES], strict=True)
        own = median(constrained - plain - probes for constrained, plain, probes in timed)
        print(f"{'Python share of the default':32} {1e3 * own:7.2f} ms, {share(calls, folder):.0f} calls a step")
        profile = cProfile.Profile()
        step_seconds("default", folder, profile=profile)
    pstats.Stats(profile).sort_stats("cumulative").print_stats("procon/", chosen.functions)


if __name__ == "__main__":
    main()
