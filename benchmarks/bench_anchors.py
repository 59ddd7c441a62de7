"""What do anchors cost: the recording, compared with an epoch of plain training, a batch's lookup, and the disk?

The epoch is plain LoRA training with transformers' loss and AdamW, the cheapest that there is. It is short, so the hash
of the weights, which a recording takes once whatever the epoch's length, is made outside and timed on its own.

A look-up verifies the checksum of each sequence. Its baseline is how the files were read before they had any.
"""

import itertools
import tempfile
from functools import cache
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import pytest
import torch

from benchmarks.harness.interleaved import Samples, interleave
from benchmarks.harness.machine import DEVICE, SMOKE
from benchmarks.harness.shapes import make_batch, make_directions, make_model, make_optimizer
from benchmarks.harness.timers import wall_time
from procon import Anchors
from procon.anchors import fingerprint
from procon.anchors.shards import AnchorShards

SHAPE, BATCHES, ROWS, LENGTH = ("smoke", 2, 2, 12) if SMOKE else ("SmolLM2-135M", 2, 2, 96)


class _Unverified(AnchorShards):
    """Reads as it was done before there were checksums."""

    def read(self, key: int) -> np.ndarray | None:
        place = self._find(key)
        if place is None:
            return None
        start, _, length, number = self._entries[place].item()
        return np.fromfile(self._files[number], "<f4", length * self._columns, offset=start).reshape(length, -1)


class _Result(NamedTuple):
    epoch: Samples
    lookup: Samples
    fingerprint_seconds: float
    bytes_per_token: float
    constrained_tokens: int


@cache
def _measure() -> _Result:
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    model = make_model(SHAPE, dtype, "lora")
    optimizer = make_optimizer(model.parameters())
    directions = make_directions(SHAPE)
    blocks = range(directions.block_count)
    large = make_batch(SHAPE, BATCHES * ROWS, LENGTH, packed=False)
    batches = [
        {name: value[start : start + ROWS] for name, value in large.items()} for start in range(0, BATCHES * ROWS, ROWS)
    ]

    state = fingerprint(model, directions, blocks, "response")
    fingerprint_seconds = wall_time(lambda: fingerprint(model, directions, blocks, "response"), 1)

    def train() -> None:
        for batch in batches:
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()

    with tempfile.TemporaryDirectory() as folder:
        fresh = (Path(folder) / str(number) for number in itertools.count())

        def record() -> Anchors:
            return Anchors.record(
                model,
                batches,
                directions,
                next(fresh),
                blocks=blocks,
                progress=False,
                state=state,
                scope="response",
            )

        epoch = interleave(
            {"plain": train, "record": record},
            wall_time,
            rounds=3 if SMOKE else 5,
            warmup=1,
        )
        anchors = record()
        on_disk = sum(file.stat().st_size for file in anchors.path.iterdir())
        on_cpu = {name: value.cpu() for name, value in batches[0].items()}
        unverified = Anchors(anchors.path)
        unverified._shards = _Unverified(anchors.path, state, len(blocks))
        lookup = interleave(
            {"unverified": lambda: unverified.annotate(on_cpu), "annotate": lambda: anchors.annotate(on_cpu)},
            wall_time,
            rounds=3 if SMOKE else 101,
            sample_seconds=0.02,
        )
    tokens = sum(int((batch["labels"] != -100).sum()) for batch in batches)
    return _Result(epoch, lookup, fingerprint_seconds, on_disk / tokens, tokens)


@pytest.mark.parametrize("contender", ["plain", "record"])
def test_recording(replay, contender: str):
    result = _measure()
    work = {"tokens_per_second": BATCHES * ROWS * LENGTH / median(result.epoch.seconds[contender])}
    if contender == "record":
        work |= {
            "bytes_per_constrained_token": result.bytes_per_token,
            "constrained_tokens": result.constrained_tokens,
            "fingerprint_seconds": result.fingerprint_seconds,
        }
    replay(f"anchors of an epoch {SHAPE} {BATCHES}x{ROWS}x{LENGTH}", result.epoch, contender, "plain", **work)


@pytest.mark.parametrize("contender", ["unverified", "annotate"])
def test_lookup(replay, contender: str):
    """A checksum may take 5% of a look-up."""
    result = _measure().lookup
    replay(f"anchors of a batch {SHAPE} {ROWS}x{LENGTH}", result, contender, "unverified")
    if not SMOKE:
        assert result.ratio("annotate", "unverified").median <= 1.05
