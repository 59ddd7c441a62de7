"""One row as a sample, what is doubtful in it, and the samples of a streamed data set."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from datasets import IterableDataset

from procon.data.columns import Converter, Sample, converter
from procon.data.turns import Turn
from procon.errors import ProConError

#: A reply that says nothing: a model trained on it learns to say nothing.
BLANK_REPLY = "a blank reply"


def sample_of(convert: Converter, row: Mapping[str, Any], name: str, number: int) -> Sample:
    """What a row says; its error names the row."""
    try:
        return convert(row)
    except ProConError as error:
        raise ProConError(f"{name!r}, row {number}: {error}") from None


def doubt_of(messages: Sequence[Turn] | None, text: str | None) -> str | None:
    """What real data have by mistake, and no template refuses."""
    if messages is None:
        return None if (text or "").strip() else BLANK_REPLY
    blank = [turn["role"] for turn in messages if not turn["content"].strip() and not turn.get("tool_calls")]
    if "assistant" in blank:
        return BLANK_REPLY
    if "user" in blank:
        return "a blank user turn"
    if any(turn["role"] == following["role"] == "assistant" for turn, following in pairwise(messages)):
        return "two assistant turns in a row"
    return None


def streamed_conversations(dataset: IterableDataset, name: str, columns: Mapping[str, str] | None) -> IterableDataset:
    """The samples of a streamed data set, made as they are read; those with a blank reply are left out."""
    first = next(iter(dataset), None)
    if first is None:
        raise ProConError(f"data {name!r} holds no rows: give one with rows")
    convert, warned = converter(first, name, columns), set()

    def take(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        """A batch of one row as one of one sample, or of none."""
        number = indices[0] + 1
        messages, tools, text = sample_of(
            convert, {column: values[0] for column, values in batch.items()}, name, number
        )
        doubt = doubt_of(messages, text)
        if doubt and doubt not in warned:
            warned.add(doubt)
            what = "left out" if doubt == BLANK_REPLY else "trained on as they are"
            warnings.warn(
                f"{name!r} has conversations with {doubt}, first row {number}, which are {what}", stacklevel=2
            )
        sample = {"text": text} if messages is None else {"messages": messages, **({"tools": tools} if tools else {})}
        return {column: [] if doubt == BLANK_REPLY else [value] for column, value in sample.items()}

    return dataset.map(take, with_indices=True, batched=True, batch_size=1, remove_columns=list(first))
