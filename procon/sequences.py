"""The single sequences inside a batch, however it was padded, packed or flattened."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from procon.errors import ProConError
from procon.settings import TokenScope

#: Label of a token that is no target.
IGNORE_INDEX = -100

#: What a collator may hand to a decoder; anything else, such as images, would be lost on the way to the anchors.
DECODER_INPUTS = {
    "input_ids",
    "attention_mask",
    "position_ids",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "max_length_q",
    "max_length_k",
    "seq_idx",
}
_NOT_DECODER_INPUTS = {"labels", "shift_labels", "logits_to_keep", "num_items_in_batch", "constraint_mask"}
#: Of preference data, as TRL's collators make them.
_OF_PREFERENCES = {
    "completion_mask",
    "label",
    "ref_chosen_logps",
    "ref_rejected_logps",
    "ref_logps",
    "ref_KL_logps",
    "KL_input_ids",
    "KL_attention_mask",
    "KL_completion_mask",
}
_MODALITY = "mm_token_type_ids"  # 0 on text


@dataclass(frozen=True)
class TokenSequence:
    """One unpadded sequence of a batch: tokens ``batch[row, start:stop]``.

    Attributes:
        input_ids: ``[T]`` int64.
        is_response: ``[T]`` bool, the tokens with a label. The first token never counts: a causal LM has no target
            for it, and flattening collators drop its label while padding ones keep it.
    """

    row: int
    start: int
    input_ids: np.ndarray
    is_response: np.ndarray

    @property
    def span(self) -> slice:
        return slice(self.start, self.start + len(self.input_ids))

    def in_scope(self, scope: TokenScope) -> np.ndarray:
        """``[T]`` bool: the constrained tokens; the paper's choice is ``response`` (section III-C1)."""
        if scope == "response":
            return self.is_response
        return ~self.is_response if scope == "prompt" else np.ones_like(self.is_response)

    def key(self) -> int:
        """64-bit content hash of the token ids and the label mask."""
        content = self.input_ids.tobytes() + self.is_response.tobytes()
        return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def check_text_only(batch: Mapping[str, Any]) -> None:
    """Raise ProConError if a batch has more than a text decoder takes: anchors would know nothing of images."""
    foreign = set(batch) - DECODER_INPUTS - _NOT_DECODER_INPUTS - _OF_PREFERENCES
    if _MODALITY in foreign and not batch[_MODALITY].any():
        foreign.remove(_MODALITY)
    if foreign:
        raise ProConError(
            f"the batch has {sorted(foreign)}, which a text decoder does not take: leave it, and samples that need it, "
            "out of the training data"
        )


def decoder_inputs(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """What a decoder takes of a batch, on its device; ProConError if there is more."""
    check_text_only(batch)
    taken = {name: value for name, value in batch.items() if name in DECODER_INPUTS}
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in taken.items()}


def labelled(batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """``batch`` with ``labels``: of preference data, which have a ``completion_mask``, those of the completions."""
    if "labels" in batch or "completion_mask" not in batch:
        return batch
    return {**batch, "labels": batch["input_ids"].masked_fill(batch["completion_mask"] == 0, IGNORE_INDEX)}


def split_batch(batch: Mapping[str, Tensor]) -> Iterator[TokenSequence]:
    """The sequences of a collated batch, by ``attention_mask``, and by ``position_ids`` or ``cu_seq_lens_q`` if packed.

    Those of one token are left out: they predict nothing, and a flattened row is padded with them. So are those of one
    token repeated, without a label: axolotl pads a packed row with positions that start again.

    Raises:
        ProConError: if the batch has no labels, or its attention mask is not one run of ones per row.
    """
    batch = labelled(batch)
    if "labels" not in batch:
        raise ProConError(
            "the batch has no 'labels': the constraint needs them to separate the response from the prompt"
        )
    ids, labels = batch["input_ids"].numpy(), batch["labels"].numpy()
    attention = batch.get("attention_mask")
    if attention is not None and attention.shape != batch["input_ids"].shape:
        raise ProConError(
            f"attention_mask has shape {tuple(attention.shape)}, input_ids {tuple(ids.shape)}: pass a mask of the "
            "same shape, or none and position_ids that restart at each sequence"
        )
    for row in range(len(ids)):
        first, last = 0, ids.shape[1]
        if attention is not None:
            kept = np.flatnonzero(attention[row].numpy())
            if len(kept) == 0:
                continue
            first, last = int(kept[0]), int(kept[-1]) + 1
            if last - first != len(kept):
                raise ProConError(f"attention_mask of row {row} has gaps: pad on one side only")
        for start, stop in pairwise(_bounds(batch, row, first, last)):
            if stop - start < 2:
                continue
            is_response = labels[row, start:stop] != IGNORE_INDEX
            is_response[0] = False
            if not is_response.any() and (ids[row, start:stop] == ids[row, start]).all():
                continue
            yield TokenSequence(row, start, ids[row, start:stop], is_response)


def _bounds(batch: Mapping[str, Tensor], row: int, first: int, last: int) -> list[int]:
    """Where the sequences of a row begin, and where the last one ends."""
    if "position_ids" in batch:
        positions = batch["position_ids"][row, first:last].numpy()
        return [first, *(np.flatnonzero(np.diff(positions) != 1) + first + 1).tolist(), last]
    if "cu_seq_lens_q" in batch and len(batch["input_ids"]) == 1:
        return [first + int(bound) for bound in batch["cu_seq_lens_q"]]
    return [first, last]
