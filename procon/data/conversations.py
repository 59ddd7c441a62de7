"""Conversations from data files, the hub, datasets and this project; the safety mix."""

from __future__ import annotations

import hashlib
import inspect
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from itertools import repeat
from pathlib import Path
from typing import Any, TypeVar

import datasets
from datasets import Dataset, Features, IterableDataset, List, Value

import procon.data.columns
import procon.data.files
import procon.data.samples
import procon.data.turns
import procon.files
from procon.chat import builtin_prompts, builtin_refusals, user_turn
from procon.data.columns import COLUMNS, Converter, check_columns, converter
from procon.data.files import check_file, content_hash, is_data_file, read_rows
from procon.data.samples import BLANK_REPLY, doubt_of, sample_of, streamed_conversations
from procon.data.turns import MORE
from procon.errors import ProConError
from procon.models import check_name

_Data = TypeVar("_Data", Dataset, IterableDataset)

#: Of a conversation whose turns have nothing but a role and a content.
_CONVERSATION = Features({"messages": List({"role": Value("string"), "content": Value("string")})})


def _json() -> Any:
    """A column of whatever JSON can hold."""
    if not hasattr(datasets, "Json"):  # which only LLaMA-Factory's versions lack
        raise ProConError(f"datasets is {datasets.__version__}: conversations are read with 4.8.4 or newer")
    return datasets.Json()


@cache
def _checked_features() -> Features:
    """A conversation, what its turns have beside role and content, its tools; or a text; and what is doubtful in it, if
    anything is."""
    more = {"more": _json(), "tools": _json(), "text": Value("string"), "doubt": Value("string")}
    return Features({**_CONVERSATION, **more})


#: Safety samples that are mixed in, at most: a list of their numbers is in memory.
_MOST_SAMPLES = 10_000_000

#: A reply that says nothing: a model trained on it learns to say nothing.
_BLANK_REPLY = "a blank reply"


def load_conversations(
    source: str | Path,
    *,
    config: str | None = None,
    split: str = "train",
    revision: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> Dataset:
    """Conversations from a JSON, JSONL, CSV or Parquet file, or from a dataset name on the hub.

    A file's name is taken as it is written, never as a pattern. What was parsed is kept in the cache folder of
    ``datasets`` under a hash of the file's content. Conversations with a blank reply are left out, with a warning.

    Args:
        config, split, revision: of a data set on the hub: which configuration, which split or slice, which commit.
        columns: what the columns are called if not as in the known formats: ``{"prompt": "Q", "response": "A"}``; or
            ``messages``, ``system``, ``tools``, ``text``.

    Returns:
        A dataset with the column ``messages``, and ``tools`` if any conversation has them; or with the column ``text``.

    Raises:
        ProConError: if there is no such file, it cannot be read, is empty, or has none of the known columns; if it is
            nested more than 64 levels deep, or a text has more than 1,000,000 characters.
    """
    path = Path(source)
    if os.path.isdir(path):
        raise ProConError(f"data {str(source)!r} is a folder: give a file in it, or a dataset name")
    check_columns(columns or {})
    if os.path.isfile(path) or is_data_file(path):
        for name, given in {
            "config": config,
            "revision": revision,
            "split": None if split == "train" else split,
        }.items():
            if given is not None:
                raise ProConError(f"data_{name} is {given!r:.60}, and data {str(source)!r} is a file: leave it out")
        check_file(path)
        arguments = {"path": str(path), "content": content_hash(path) + _code(), "columns": dict(columns or {})}
        with _quiet():
            checked = _read(
                lambda: Dataset.from_generator(
                    _conversations_of_file, features=_checked_features(), gen_kwargs=arguments
                ),
                source,
            )
        return _settled(checked, str(source))
    check_name(source, "data", "give a .json, .jsonl, .csv or .parquet file, or a dataset name")
    with _quiet():
        dataset = _read(lambda: datasets.load_dataset(str(source), config, split=split, revision=revision), source)
    return to_conversations(dataset, name=str(source), columns=columns)


@contextmanager
def _quiet() -> Iterator[None]:
    """The builders log what they raise as well: not within the context."""
    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)


def _read(load: Callable[[], Dataset], source: str | Path) -> Dataset:
    """What ``load`` returns; its errors, which are of many libraries, as a ProConError."""
    try:
        dataset = load()
    except Exception as error:
        cause = error.__cause__ or error
        if isinstance(cause, ProConError):
            raise cause from None
        reason = next(iter(str(cause).splitlines()), type(cause).__name__)
        raise ProConError(
            f"data {str(source)!r} cannot be read ({reason}): give a .json, .jsonl, .csv or .parquet file, or a "
            "dataset name"
        ) from error
    if len(dataset) == 0:
        raise _no_rows(source)
    return dataset


def _no_rows(source: str | Path) -> ProConError:
    return ProConError(f"data {str(source)!r} holds no rows: give one with rows")


def _conversations_of_file(path: str, content: str, columns: dict[str, str]) -> Iterator[dict[str, Any]]:
    """Rows of :func:`_checked_features`; of two calls with equal arguments, ``datasets`` makes one."""
    convert = None
    for number, row in enumerate(read_rows(Path(path), COLUMNS | set(columns.values())), 1):
        convert = convert or converter(row, path, columns)
        yield _checked(convert, row, path, number)
    if convert is None:
        raise _no_rows(path)


def _code() -> str:
    """Changes with what reads files, so that what an older version parsed is not taken for what this one would."""
    rooms = (procon.data.columns, procon.data.files, procon.data.samples, procon.data.turns, procon.files)
    sources = "".join(map(inspect.getsource, (*rooms, sys.modules[__name__])))
    return hashlib.sha256(sources.encode()).hexdigest()


def to_conversations(dataset: _Data, *, name: str = "dataset", columns: Mapping[str, str] | None = None) -> _Data:
    """Bring a dataset in any known format to the column ``messages``, of turns with a role and a content.

    Conversations with a blank reply are left out, with a warning; of a streamed dataset, as they come.

    Args:
        columns: what the columns are called, as :func:`load_conversations` takes it.

    Returns:
        A dataset with the column ``messages``, and ``tools`` if any conversation has them; or with the column ``text``.

    Raises:
        ProConError: if it has none of the known columns, or a row holds something else than texts; of a streamed
            dataset, when the row is read.
    """
    if isinstance(dataset, IterableDataset):
        return streamed_conversations(dataset, name, columns)
    convert = converter(dataset.column_names, name, columns)
    checked = dataset.map(
        lambda row, index: _checked(convert, row, name, index + 1),
        with_indices=True,
        remove_columns=dataset.column_names,
        features=_checked_features(),
        desc="conversations",
    )
    return _settled(checked, name)


def _checked(convert: Converter, row: Mapping[str, Any], name: str, number: int) -> dict[str, Any]:
    messages, tools, text = sample_of(convert, row, name, number)
    plain = messages and [{key: turn[key] for key in ("role", "content")} for turn in messages]
    more = messages and [{key: turn[key] for key in MORE if key in turn} for turn in messages]
    doubt = doubt_of(messages, text)
    return {"messages": plain, "more": more if any(more or ()) else None, "tools": tools, "text": text, "doubt": doubt}


def _settled(checked: Dataset, name: str) -> Dataset:
    """The conversations to train on; a warning says how many are doubtful, and which is the first."""
    doubts = checked.data.column("doubt").to_pylist()
    for doubt, count in Counter(filter(None, doubts)).items():
        left_out = doubt == BLANK_REPLY
        warnings.warn(
            f"{count} of {len(doubts)} conversations of {name!r} have {doubt}, first row {doubts.index(doubt) + 1}, "
            f"and are {'left out' if left_out else 'trained on as they are'}",
            stacklevel=4,
        )
    if BLANK_REPLY in doubts:
        checked = checked.select([index for index, doubt in enumerate(doubts) if doubt != BLANK_REPLY])
    if len(checked) == 0:
        raise ProConError(f"{name!r} has no conversation without a blank reply: give ones that say something")
    checked = checked.remove_columns("doubt")
    if _has(checked, "text"):
        warnings.warn(
            f"{name!r} has texts, not conversations: each is trained on as a whole, prompts included", stacklevel=4
        )
        return checked.select_columns("text")
    tools = ["tools"] if _has(checked, "tools") else []
    if not _has(checked, "more"):
        return checked.select_columns(["messages", *tools])
    # In place of a table's columns, of which each turn would have all that any turn has.
    return checked.map(
        lambda row: {"messages": [{**turn, **more} for turn, more in zip(row["messages"], row["more"] or repeat({}))]},  # noqa: B905
        remove_columns=[column for column in ("more", "text", "tools") if column not in tools],
        features=Features({"messages": _json(), **{column: _json() for column in tools}}),
        desc="tool calls",
    )


def _has(dataset: Dataset, column: str) -> bool:
    """Whether any row has something in the column."""
    found = dataset.with_format("arrow")[:][column]
    if not isinstance(dataset.features[column], type(_json())):
        return found.null_count < len(found)
    # Earlier versions of datasets write JSON's own null for a value that is missing.
    return any(value.as_py() not in (None, "null") for value in found)


def safety_conversations() -> Dataset:
    """Built-in safety samples: each malicious prompt of the safety split with a refusal (paper III-C3, IFT_safe)."""
    refusals = builtin_refusals()
    return Dataset.from_list(
        [
            {"messages": [*user_turn(prompt), {"role": "assistant", "content": refusals[index % len(refusals)]}]}
            for index, prompt in enumerate(builtin_prompts("safety").malicious)
        ],
        features=_CONVERSATION,
    )


def mix_safety(dataset: Dataset, safety: Dataset, samples: int, *, seed: int) -> Dataset:
    """``dataset`` with ``samples`` rows of ``safety`` shuffled in; rows repeat if there are too few."""
    if samples < 0:
        raise ProConError(f"safety_samples is {samples}: give 0 or more")
    if samples > _MOST_SAMPLES:
        raise ProConError(f"safety_samples is {samples}: give at most {_MOST_SAMPLES}")
    rows = [index % len(safety) for index in range(samples)]
    chosen = safety.shuffle(seed=seed).select(rows)
    features = Features({**chosen.features, **dataset.features})
    parts = [_with_features(part, features) for part in (dataset, chosen)]
    return datasets.concatenate_datasets(parts).shuffle(seed=seed)


def _with_features(dataset: Dataset, features: Features) -> Dataset:
    """The same rows in these columns; nothing in those that they have not."""
    if dataset.features.keys() == features.keys() and _json() not in features.values():
        return dataset.cast(features)
    return dataset.map(lambda row: {name: row.get(name) for name in features}, features=features, desc="safety mix")
