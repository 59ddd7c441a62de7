"""Conversations as token ids and response labels, and the collators that batch them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import datasets
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, DataCollatorWithFlattening, PreTrainedTokenizerBase

from procon.chat import pad_token_id, response_mask
from procon.errors import ProConError
from procon.sequences import IGNORE_INDEX


def tokenize_conversations(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = None,
    progress: bool = True,
) -> Dataset:
    """Token ids, and labels on the assistant's tokens only: columns ``input_ids`` and ``labels``.

    Samples longer than ``max_length`` are cut on the right; one with no response token left is dropped, with a warning.
    Another warning counts the conversations whose texts have special tokens of the tokenizer in them.

    Raises:
        ProConError: if no sample has a response token, or the chat template cannot render a conversation.
    """
    if max_length is not None and max_length < 1:
        raise ProConError(f"max_length is {max_length}: give 1 or more")

    special = [str(token) for token in tokenizer.all_special_tokens if str(token).strip()]

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        ids, mask = response_mask(tokenizer, row["messages"])
        labels = [token if keep else IGNORE_INDEX for token, keep in zip(ids, mask, strict=True)]
        forged = any(token in turn["content"] for turn in row["messages"] for token in special)
        return {"input_ids": ids[:max_length], "labels": labels[:max_length], "forged": forged}

    with _progress_bars(progress):
        encoded = dataset.map(encode, remove_columns=dataset.column_names, desc="tokenizing")
        forged = encoded.data.column("forged").to_pylist()
        encoded = encoded.remove_columns("forged")
        kept = encoded.filter(lambda row: any(label != IGNORE_INDEX for label in row["labels"]), desc="with response")
    if len(kept) == 0:
        raise ProConError(
            f"none of the {len(dataset)} samples has a response token within max_length {max_length}: add assistant "
            "turns, or raise max_length"
        )
    if any(forged):
        warnings.warn(
            f"{sum(forged)} of {len(dataset)} conversations have special tokens of the tokenizer in their texts, first "
            f"row {forged.index(True) + 1}: the model reads them as the chat template's own, which end turns and begin "
            "others",
            stacklevel=2,
        )
    if len(kept) < len(dataset):
        warnings.warn(
            f"{len(dataset) - len(kept)} of {len(dataset)} samples have no response token within max_length "
            f"{max_length} and are left out",
            stacklevel=2,
        )
    return kept


@contextmanager
def _progress_bars(shown: bool) -> Iterator[None]:
    """Hide the library's progress bars within the context; never show ones that the user has switched off."""
    if shown or datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()


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
