"""Conversations from data files, the hub, datasets and this project; and what is mixed in: refusals, or own replies."""

from __future__ import annotations

import csv
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import datasets
from datasets import Dataset, Features, IterableDataset
from pyarrow import parquet
from torch import nn
from transformers import PreTrainedTokenizerBase

from procon.chat import builtin_probe_pairs, builtin_prompts, builtin_refusals, generate, json_rows, user_turn
from procon.data.formats import sample_of
from procon.errors import ProConError
from procon.models import is_sharded
from procon.ranks import on_main
from procon.settings import DATA_SUFFIXES, ChatSettings, check_name
from procon.version import __version__

_Data = TypeVar("_Data", Dataset, IterableDataset)

_FILES = "a .json, .jsonl, .csv or .parquet file"


def load_conversations(
    source: str | Path,
    *,
    config: str | None = None,
    split: str = "train",
    revision: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> Dataset:
    """Conversations from a JSON, JSONL, CSV or Parquet file, or from a dataset name on the hub.

    A file's name is taken as it is written, never as a pattern. Conversations with a blank reply are left out, with a
    warning.

    Args:
        config, split, revision: of a data set on the hub: which configuration, which split or slice, which commit.
        columns: what the columns are called if not as in the known formats: ``{"prompt": "Q", "response": "A"}``; or
            ``messages``, ``system``, ``tools``.

    Returns:
        A dataset with the column ``messages``, and ``tools`` if any conversation has them.

    Raises:
        ProConError: if there is no such file, it is damaged or empty, or a row has none of the known formats.
    """
    name, path = str(source), Path(source)
    is_file = path.suffix.lower() in DATA_SUFFIXES
    if not is_file and not os.path.exists(path):
        check_name(source, "data", f"give {_FILES}, or a dataset name")
    elif not is_file or not os.path.isfile(path):
        raise ProConError(f"data {name!r} does not exist, or is no file of a known type: give {_FILES}")
    elif (config, split, revision) != (None, "train", None):
        raise ProConError(f"data {name!r} is a file: leave out data_config, data_split and data_revision")
    try:
        if not is_file:
            dataset = datasets.load_dataset(name, config, split=split, revision=revision)
            return to_conversations(dataset, name=name, columns=columns)
        # By these arguments ``datasets`` knows in its cache what it has read before.
        state = {"path": name, "columns": dict(columns or {}), "seen": (os.stat(path).st_mtime_ns, __version__)}
        return _said(Dataset.from_generator(_file_samples, _features(), gen_kwargs=state), name)
    except Exception as error:  # of many libraries
        cause = error.__cause__ or error
        if isinstance(cause, ProConError):
            raise cause from None
        reason = next(iter(str(cause).splitlines()), type(cause).__name__)
        raise ProConError(f"data {name!r} cannot be read ({reason:.200}): give {_FILES}, or a dataset name") from error


def _file_samples(path: str, columns: dict[str, str], seen: object) -> Iterator[dict[str, Any]]:
    """Rows of :func:`_features`."""
    for number, row in _rows(Path(path)):
        yield sample_of(row, f"data {path!r}, row {number}", columns)


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    """By our own readers: those of ``datasets`` take names for patterns, 2026-01-01 for a date and None for nothing."""
    if path.suffix.lower() == ".csv":
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from enumerate(csv.DictReader(file), 1)
    elif path.suffix.lower() == ".parquet":
        with parquet.ParquetFile(path) as file:
            yield from enumerate((row for batch in file.iter_batches(1024) for row in batch.to_pylist()), 1)
    else:
        yield from json_rows(path, "data")


def _features() -> Features:
    """Turns and tools are whatever JSON can hold: as tables, each would have all keys that any of them has."""
    return Features({"messages": datasets.Json(), "tools": datasets.Json()})


def to_conversations(dataset: _Data, *, name: str = "dataset", columns: Mapping[str, str] | None = None) -> _Data:
    """Bring a dataset in any known format to the column ``messages``, of turns with a role and a content.

    Conversations with a blank reply are left out, with a warning; of a streamed dataset, which is converted as it is
    read, without one.

    Args:
        columns: what the columns are called, as :func:`load_conversations` takes it.

    Returns:
        As :func:`load_conversations` does; a streamed dataset has both columns.

    Raises:
        ProConError: for a row that has none of the known formats.
    """
    converted = dataset.map(
        lambda row, index: sample_of(row, f"data {name!r}, row {index + 1}", columns),
        with_indices=True,
        remove_columns=list(next(iter(dataset), {})),
        features=_features(),
    )
    return _said(converted, name) if isinstance(converted, Dataset) else converted.filter(_says_something)


def _said(dataset: Dataset, name: str) -> Dataset:
    """The conversations that say something."""
    kept = [index for index, row in enumerate(dataset) if _says_something(cast("dict[str, Any]", row))]
    if not kept:
        raise ProConError(f"data {name!r} has no rows, or none without a blank reply: give ones that say something")
    if len(kept) < len(dataset):
        warnings.warn(
            f"{len(dataset) - len(kept)} of {len(dataset)} conversations of {name!r} have a blank reply, and are left "
            "out",
            stacklevel=2,
        )
        dataset = dataset.select(kept)
    return dataset if any(dataset["tools"]) else dataset.remove_columns("tools")


def _says_something(row: Mapping[str, Any]) -> bool:
    """Whether no reply is blank: a model trained on blank ones learns to say nothing."""
    replies = [turn for turn in row["messages"] if turn["role"] == "assistant"]
    return all(turn["content"].strip() or turn.get("tool_calls") for turn in replies)


def safety_conversations() -> Dataset:
    """Built-in safety samples: each malicious prompt of the safety split with a refusal (paper III-C3, IFT_safe)."""
    refusals = builtin_refusals()
    return Dataset.from_list(
        [
            {"messages": [*user_turn(prompt), {"role": "assistant", "content": refusals[index % len(refusals)]}]}
            for index, prompt in enumerate(builtin_prompts("safety").malicious)
        ],
        features=Features(messages=datasets.Json()),
    )


def own_replies(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, *, chat: ChatSettings | None = None, progress: bool = True
) -> Dataset:
    """What a chat model says before training, as samples: greedy replies, of 48 tokens at most, to the built-in probes
    and their benign twins. One that goes on after them is marked as a ``prefix``, whose end
    :func:`tokenize_conversations` leaves out. Of ranks, all must call, and have those of the main one.

    Args:
        chat: how the model is asked. The samples have its system prompt; of a thought that does not end, there is none.

    Raises:
        ProConError: if no reply says anything.
    """
    pairs = builtin_probe_pairs()
    system = [{"role": "system", "content": chat.system_prompt}] if chat and chat.system_prompt else []
    asked = [[*system, *user_turn(text)] for text in (*pairs.malicious, *pairs.benign)]
    settings: dict[str, Any] = {"chat": chat, "description": "own replies", "progress": progress}
    found = on_main(lambda: generate(model, tokenizer, asked, **settings), all_call=is_sharded(model))
    rows = [
        [*turns, {"role": "assistant", "content": reply.text, "prefix": not reply.ended}]
        for turns, reply in zip(asked, found, strict=True)
    ]
    return to_conversations(Dataset.from_dict({"messages": rows}), name="own replies")


def mix_in(dataset: Dataset, others: Dataset, samples: int, *, seed: int) -> Dataset:
    """``dataset`` with ``samples`` rows of ``others`` shuffled in; rows repeat if there are too few."""
    if samples < 0:
        raise ProConError(f"samples to mix in are {samples}: give 0 or more")
    dataset, others = (
        part if part.features.get("messages") == datasets.Json() else to_conversations(part)
        for part in (dataset, others)
    )
    chosen = others.shuffle(seed=seed).select([index % len(others) for index in range(samples)])
    return datasets.concatenate_datasets([dataset, chosen]).shuffle(seed=seed)
