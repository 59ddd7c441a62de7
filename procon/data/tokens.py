"""Conversations as token ids and response labels, and the collators that batch them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, get_args

import datasets
from datasets import Dataset, IterableDataset
from transformers import DataCollatorForSeq2Seq, DataCollatorWithFlattening, PreTrainedTokenizerBase

from procon.chat import marked_template, pad_token_id, response_mask
from procon.data.overlong import Overlong, report_overlong, streamed_samples
from procon.errors import ProConError
from procon.sequences import IGNORE_INDEX
from procon.settings import ChatSettings, check_choice

_Data = TypeVar("_Data", Dataset, IterableDataset)


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

    Of a row that has ``text`` in place of ``messages``, all tokens have labels, and the last one ends the text. A row
    without a response is left out, with a warning. Another warning counts the conversations whose texts have special
    tokens of the tokenizer in them.

    Args:
        chat: variables of the chat template; its system prompt is for what is asked, not for these.
        max_length: tokens of the longest sample.
        overlong: what is done with longer ones: ``"cut"``, on the right, which leaves out those that lose their whole
            response; ``"drop"``, left out; or ``"error"``. A warning says how many they are, and how many tokens are
            lost.

    Of a streamed dataset, rows are made as they are read: warnings are of the first one of each kind, without counts.

    Raises:
        ProConError: if no sample has a response token, the chat template cannot render a conversation, or samples are
            too long and ``overlong`` is ``"error"``.
    """
    if max_length is not None and max_length < 1:
        raise ProConError(f"max_length is {max_length}: give 1 or more")
    check_choice("overlong", overlong, get_args(Overlong))
    marked_template(tokenizer)  # found once, before a progress bar waits for it
    special = [str(token) for token in tokenizer.all_special_tokens if str(token).strip()]

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        messages = row.get("messages")
        if messages is None:
            ids = _text_ids(tokenizer, row["text"])
            labels = list(ids)
        else:
            ids, mask = response_mask(tokenizer, messages, tools=row.get("tools"), chat=chat)
            labels = [token if keep else IGNORE_INDEX for token, keep in zip(ids, mask, strict=True)]
        forged = any(token in turn["content"] for turn in messages or () for token in special)
        replies = any(label != IGNORE_INDEX for label in labels)
        found = {"input_ids": ids[:max_length], "labels": labels[:max_length]}
        return {**found, "length": len(ids), "replies": replies, "forged": forged}

    if isinstance(dataset, IterableDataset):
        return streamed_samples(dataset, encode, max_length, overlong)
    with _progress_bars(progress):
        encoded = dataset.map(encode, remove_columns=dataset.column_names, desc="tokenizing")
        length, replies, forged = (encoded.data.column(name).to_pylist() for name in ("length", "replies", "forged"))
        encoded = encoded.remove_columns(["length", "replies", "forged"])
        kept = encoded.filter(lambda row: any(label != IGNORE_INDEX for label in row["labels"]), desc="with response")
        if overlong == "drop" and max_length is not None and max(length) > max_length:
            whole = [at for at, size in enumerate(length) if size <= max_length and replies[at]]
            kept = encoded.select(whole)
    if len(kept) == 0 and overlong != "error":
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
    silent = replies.count(False)
    if silent:
        warnings.warn(
            f"{silent} of {len(dataset)} samples have no response, first row {replies.index(False) + 1}, and are left "
            "out",
            stacklevel=2,
        )
    report_overlong(length, max_length, overlong, lost=len(dataset) - silent - len(kept))
    return kept


def _text_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """As the tokenizer begins texts, and with its end of text."""
    ids: list[int] = tokenizer(text)["input_ids"]
    end: Any = tokenizer.eos_token_id
    return ids if end is None or ids[-1:] == [end] else [*ids, end]


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
