"""A data set of synthetic sequences whose tokens and projections follow from their numbers, so that none is kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from procon.anchors.manifest import Manifest
from procon.sequences import IGNORE_INDEX, TokenSequence

#: Of no model's state.
FINGERPRINT = "0000005ca1e00000"

VOCABULARY = 49_152

#: So many sequences differ in the first digits of their projections.
_OFFSETS = 4096


@dataclass(frozen=True)
class Job:
    """Sequences of one length, and where their anchors are.

    Attributes:
        tokens: per sequence, all of them constrained; the last two thirds have labels.
        sites: constrained places per token.
    """

    folder: Path
    sequences: int
    tokens: int = 8
    sites: int = 30

    @property
    def manifest(self) -> Manifest:
        return Manifest(FINGERPRINT, tuple(range(self.sites)), "all")

    def batch(self, numbers: Sequence[int] | np.ndarray) -> dict[str, Tensor]:
        """The sequences of those numbers as a collator makes them: ``[n, tokens]``."""
        places = np.asarray(numbers, np.uint64)[:, None] * np.uint64(self.tokens) + np.arange(self.tokens, dtype="u8")
        ids = torch.from_numpy((_mixed(places) % np.uint64(VOCABULARY)).astype(np.int64))
        labels = ids.clone()
        labels[:, : self.tokens // 3] = IGNORE_INDEX
        return {"input_ids": ids, "labels": labels}

    def make(self, numbers: Sequence[int] | np.ndarray) -> Iterator[TokenSequence]:
        """The same, one by one: as :func:`procon.sequences.split_batch` finds them in that batch."""
        batch = self.batch(numbers)
        is_response = batch["labels"][0].numpy() != IGNORE_INDEX
        is_response[0] = False
        for row, ids in enumerate(batch["input_ids"].numpy()):
            yield TokenSequence(row, 0, ids, is_response)

    def rows(self, numbers: Sequence[int] | np.ndarray) -> np.ndarray:
        """Their projections, ``[n, tokens, sites]`` fp32."""
        base = np.random.default_rng(0).standard_normal((self.tokens, self.sites), dtype=np.float32)
        offsets = (_mixed(np.asarray(numbers, np.uint64)) % np.uint64(_OFFSETS)).astype(np.float32)
        return base + offsets[:, None, None]


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """64 bits that look random, another value for each number (the finaliser of SplitMix64)."""
    with np.errstate(over="ignore"):
        mixed = (numbers + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
