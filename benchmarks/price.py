"""What does a whole step of the default cost? ``python -m benchmarks.price``: ProConTrainer beside the plain Trainer.

Real trainers take turns of as many steps as hold a run of the probes, on samples of 64 and of 512 tokens,
padded and packed, with LoRA and in full: SmolLM2-135M's shape and its own chat template, float32 on a CPU. Printed is
a step's time over the plain one's. ``--paper`` counts the FLOPs of larger models instead.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import product
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import AutoTokenizer

from benchmarks.harness.interleaved import Samples, interleave
from benchmarks.harness.shapes import make_batch, make_model
from benchmarks.harness.timers import wall_time
from benchmarks.harness.trainers import make_trainer
from benchmarks.harness.turns import Turns
from procon import ProConSettings
from procon.data import flattening_collator, padding_collator
from procon.demo import fetch_demo_model

SHAPE, ROWS, LENGTHS = "SmolLM2-135M", 8, (64, 512)
#: Of the default, and of what takes less.
SETTINGS = {
    "default": {},
    "last states": {"procon_probe_reply_tokens": 0, "procon_probe_batch": 8},
    "two probes at a time": {"procon_probe_batch": 2},
    "training tokens alone": {"procon_terms": "tokens"},
    "both": {"procon_terms": "both"},
}
#: Tokens of a turn of probes with SmolLM2's template, and of how many the next is predicted; on several ranks, of the
#: one that has most, for which the others wait.
TURNS = {
    "default": (240, 137),
    "default, on each of two ranks": (147, 83),
    "default, on each of four ranks": (91, 47),
    "last states": (190, 0),
    "two probes at a time": (133, 69),
}
#: Blocks, width, MLP width, key-value width and vocabulary.
PAPER = {
    "1B": (16, 2048, 8192, 512, 128256),
    "7B": (32, 4096, 11008, 4096, 32000),
    "70B": (80, 8192, 28672, 1024, 128256),
}


def time_steps(names: Sequence[str], length: int, packed: bool, training: str, rounds: int, folder: str) -> Samples:
    """Seconds of turns of each contender."""
    every = ProConSettings.probe_every
    tokenizer = AutoTokenizer.from_pretrained(fetch_demo_model())
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    collator = flattening_collator() if packed else padding_collator(tokenizer)
    batch = make_batch(SHAPE, ROWS, length, packed=False)
    with ExitStack() as stack:
        turns = {}
        for name in ("plain", *names):
            model = make_model(SHAPE, torch.float32, training)
            steps = every * (rounds + 9)
            trainer = make_trainer(SETTINGS.get(name), model, batch, tokenizer, collator, folder, max_steps=steps)
            turns[name] = stack.enter_context(Turns(trainer, every))
        progress = stack.enter_context(tqdm(total=len(turns) * (rounds + 3), unit="turn", leave=False))

        def timed(turn: Any, calls: int) -> float:
            seconds = wall_time(turn, calls)
            progress.update(calls)
            return seconds

        return interleave(turns, timed, rounds=rounds, warmup=2)


def paper() -> None:
    """FLOPs of a step over the plain one's."""
    for setting, (tokens, predicted) in TURNS.items():
        print(f"FLOPs of a step over the plain one's, {setting}")
        for name, (blocks, width, mlp, key, words) in PAPER.items():
            body = blocks * (2 * width * width + 2 * width * key + 3 * width * mlp)
            head = width * words  # multiplied whether tied or not
            for length in LENGTHS:
                turn = (tokens * body + predicted * head) / ProConSettings.probe_every
                print(f"  {name:4} {ROWS} x {length:3}: {1 + turn / (ROWS * length * (body + head)):.3f}")


def main(argv: list[str] | None = None) -> None:
    """Print the ratios, medians with their 95% intervals."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.price", description=__doc__)
    parser.add_argument("--rounds", type=int, default=31, help="turns of each")
    parser.add_argument("--length", type=int, action="append", choices=LENGTHS, help="of samples; may be repeated")
    parser.add_argument("--short", action="store_true", help="padded samples and LoRA alone, with probes")
    parser.add_argument("--paper", action="store_true", help="count FLOPs of larger models, and time nothing")
    chosen = parser.parse_args(argv)
    if chosen.paper:
        paper()
        return
    with tempfile.TemporaryDirectory() as folder:
        for length, packed, training in product(chosen.length or LENGTHS, (False, True), ("lora", "full")):
            if chosen.short and (packed or training == "full"):
                continue
            names = list(SETTINGS)[:3] if chosen.short else list(SETTINGS)
            samples = time_steps(names, length, packed, training, chosen.rounds, folder)
            print(f"{ROWS} x {length} tokens, {'packed' if packed else 'padded'}, {training}")
            for name in names:
                ratio = samples.ratio(name, "plain")
                print(f"  {name:24} {ratio.median:.3f} ({ratio.low:.3f} to {ratio.high:.3f}), {chosen.rounds} pairs")


if __name__ == "__main__":
    main()
