"""Conversations as token ids and response labels, and the collators that batch them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, TypeVar, cast, get_args

import datasets
import numpy as np
from datasets import Dataset, IterableDataset
from transformers import DataCollatorForSeq2Seq, DataCollatorWithFlattening, PreTrainedTokenizerBase

from procon.chat import pad_token_id, response_mask
from procon.errors import ProConError
from procon.sequences import IGNORE_INDEX
from procon.settings import ChatSettings, check_choice

_Data = TypeVar("_Data", Dataset, IterableDataset)

Overlong = Literal["cut", "drop"]


def tokenize_conversations(
    dataset: _Data,
    tokenizer: PreTrainedTokenizerBase,
    *,
    chat: ChatSettings | None = None,
    max_length: int | None = None,
    overlong: Overlong = "cut",
    progress: bool = True,
) -> _Data:
    """Token ids, and labels on the assistant's tokens only: columns ``input_ids`` and ``labels``.

    Rows without a response are left out. Warnings count them, and those that are too long; of a streamed dataset, which
    is made as it is read, nothing is counted.

    Args:
        chat: variables of the chat template; its system prompt is for what is asked, not for these.
        max_length: tokens of the longest sample.
        overlong: what is done with longer ones: ``"cut"``, on the right, which leaves out those that lose their whole
            response; or ``"drop"``, left out.
        progress: whether the bars of datasets show how far it is.

    Raises:
        ProConError: if no sample has a response token, or the chat template cannot render a conversation.
    """
    if max_length is not None and max_length < 1:
        raise ProConError(f"max_length is {max_length}: give 1 or more")
    check_choice("overlong", overlong, get_args(Overlong))

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        ids, mask = response_mask(tokenizer, row["messages"], tools=row.get("tools"), chat=chat)
        labels = [token if keep else IGNORE_INDEX for token, keep in zip(ids, mask, strict=True)]
        return {"input_ids": ids[:max_length], "labels": labels[:max_length], "length": len(ids)}

    def is_kept(row: Mapping[str, Any]) -> bool:
        fits = overlong == "cut" or row["length"] == len(row["labels"])
        return fits and any(label != IGNORE_INDEX for label in row["labels"])

    with nullcontext() if progress else _without_bars():
        encoded = dataset.map(encode, remove_columns=list(next(iter(dataset), {})))
        kept = encoded.filter(is_kept)
    if isinstance(encoded, Dataset):
        _warn_of_losses(np.array(encoded["length"][:]), len(cast(Dataset, kept)), max_length, overlong)
    return kept.remove_columns("length")


@contextmanager
def _without_bars() -> Iterator[None]:
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _warn_of_losses(length: np.ndarray, kept: int, max_length: int | None, overlong: Overlong) -> None:
    samples, most = len(length), max_length or length.max(initial=0)
    if kept == 0:
        raise ProConError(
            f"none of the {samples} samples has a response token within max_length {max_length}: add assistant turns, "
            "or raise max_length"
        )
    if (longer := length > most).any():
        lost = np.maximum(length - most, 0).sum()
        end = "left out" if overlong == "drop" else f"cut: {lost} of {length.sum()} tokens are lost"
        warnings.warn(
            f"{longer.sum()} of {samples} samples are longer than max_length {max_length}, the longest has "
            f"{length.max()} tokens, first row {longer.argmax() + 1}, and are {end}",
            stacklevel=3,
        )
    if kept < samples:
        warnings.warn(
            f"{samples - kept} of {samples} samples are left out, as they have no response within max_length "
            f"{max_length}{' or are longer' * (overlong == 'drop')}",
            stacklevel=3,
        )


def padding_collator(tokenizer: PreTrainedTokenizerBase) -> DataCollatorForSeq2Seq:
    """Pads ``input_ids`` and ``labels`` to the longest of the batch."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token_id = pad_token_id(tokenizer)
    return DataCollatorForSeq2Seq(tokenizer, padding=True, label_pad_token_id=IGNORE_INDEX)


def flattening_collator(*, bounds: bool = False) -> DataCollatorWithFlattening:
    """Joins a batch into one row without padding; ``position_ids`` restart at each sequence.

    Args:
        bounds: hand out where sequences begin and end as well, as ``cu_seq_lens_q``, ``cu_seq_lens_k``,
            ``max_length_q``, ``max_length_k`` and ``seq_idx``: FlashAttention need not work it out in each block, and
            recurrent blocks need it to keep sequences apart.
    """
    return DataCollatorWithFlattening(return_tensors="pt", return_flash_attn_kwargs=bounds, return_seq_idx=bounds)
