"""Samples that are longer than training takes: cut, left out or refused, and said in any case."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

from datasets import IterableDataset

from procon.errors import ProConError
from procon.sequences import IGNORE_INDEX

Overlong = Literal["cut", "drop", "error"]


def report_overlong(lengths: Sequence[int], max_length: int | None, overlong: Overlong, lost: int) -> None:
    """Warn of samples longer than ``max_length``, with what becomes of them.

    Args:
        lengths: tokens of each sample as it came.
        lost: how many are left out, though they had a response.

    Raises:
        ProConError: if they are an error.
    """
    longer = [] if max_length is None else [length for length in lengths if length > max_length]
    if max_length is None or not longer:
        return
    first = next(at for at, length in enumerate(lengths, 1) if length > max_length)
    if overlong == "error":
        raise ProConError(
            f"{len(longer)} of {len(lengths)} samples are longer than max_length {max_length}, the longest has "
            f"{max(longer)} tokens, first row {first}: raise max_length, or set overlong to 'cut' or 'drop'"
        )
    those = f"{len(longer)} of {len(lengths)} samples are longer than max_length {max_length}, the longest has "
    those += f"{max(longer)} tokens, first row {first}"
    if overlong == "drop":
        warnings.warn(f"{those}, and are left out", stacklevel=3)
        return
    tokens = sum(longer) - max_length * len(longer)
    text = f"{those}, and are cut: {tokens} of {sum(lengths)} tokens are lost"
    if lost:
        text += f"; {lost} of them have no response token left, and are left out"
    warnings.warn(text, stacklevel=3)


def streamed_samples(
    dataset: IterableDataset, encode: Callable[[Any], dict[str, Any]], max_length: int | None, overlong: Overlong
) -> IterableDataset:
    """The encoded rows of a streamed data set, made as they are read; the first of each kind of doubt is warned of.

    Reading it raises ProConError for a row that is too long, if that is an error.
    """
    first = next(iter(dataset), None)
    if first is None:
        raise ProConError("the streamed samples have no rows: give some")
    warned = set()

    def warn(what: str, number: int) -> None:
        if what not in warned:
            warned.add(what)
            warnings.warn(f"row {number} of the streamed samples {what}; of others it is not said", stacklevel=3)

    def take(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        """A batch of one row as one of one sample, or of none."""
        number, sample = indices[0] + 1, encode({column: values[0] for column, values in batch.items()})
        is_longer = max_length is not None and sample["length"] > max_length
        if is_longer and overlong == "error":
            raise ProConError(
                f"row {number} has {sample['length']} tokens, more than max_length {max_length}: raise max_length, or "
                "set overlong to 'cut' or 'drop'"
            )
        if is_longer:
            warn(f"is longer than max_length {max_length} and is {'cut' if overlong == 'cut' else 'left out'}", number)
        if sample["forged"]:
            warn("has special tokens of the tokenizer in its texts", number)
        there = any(label != IGNORE_INDEX for label in sample["labels"])
        if not there:
            warn("has no response within max_length" if is_longer else "has no response", number)
        kept = there and not (is_longer and overlong == "drop")
        return {name: [sample[name]] if kept else [] for name in ("input_ids", "labels")}

    return dataset.map(take, with_indices=True, batched=True, batch_size=1, remove_columns=list(first))
