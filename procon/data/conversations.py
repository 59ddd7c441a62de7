"""Conversations from data files, the hub, datasets and this project; the safety mix."""

from __future__ import annotations

import hashlib
import inspect
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, Features, List, Value

import procon.data.files
import procon.files
from procon.chat import Message, builtin_prompts, builtin_refusals
from procon.data.files import check_file, content_hash, is_data_file, read_rows
from procon.errors import ProConError
from procon.files import MAX_TEXT
from procon.models import check_name

_Converter = Callable[[dict[str, Any]], list[Message]]

_CONVERSATION = Features({"messages": List({"role": Value("string"), "content": Value("string")})})

#: A conversation, and what is doubtful in it; nothing if it is in order.
_CHECKED = Features({**_CONVERSATION, "doubt": Value("string")})

_FORMATS = "'messages', 'prompt' + 'completion', or 'instruction' (+ 'input') + 'output'"

#: Safety samples that are mixed in, at most: a list of their numbers is in memory.
_MOST_SAMPLES = 10_000_000

#: A reply that says nothing: a model trained on it learns to say nothing.
_BLANK_REPLY = "a blank reply"


def load_conversations(source: str | Path, *, split: str = "train") -> Dataset:
    """Conversations from a JSON, JSONL, CSV or Parquet file, or from a dataset name on the hub.

    A file's name is taken as it is written, never as a pattern. What was parsed is kept in the cache folder of
    ``datasets`` under a hash of the file's content. Conversations with a blank reply are left out, with a warning.

    Returns:
        A dataset with the one column ``messages``.

    Raises:
        ProConError: if there is no such file, it cannot be read, is empty, or has none of the known columns; if it is
            nested more than 64 levels deep, or a text has more than 1,000,000 characters.
    """
    path = Path(source)
    if path.is_dir():
        raise ProConError(f"data {str(source)!r} is a folder: give a file in it, or a dataset name")
    if path.is_file() or is_data_file(path):
        check_file(path)
        arguments = {"path": str(path), "content": content_hash(path) + _code()}
        with _quiet():
            checked = _read(
                lambda: Dataset.from_generator(_conversations_of_file, features=_CHECKED, gen_kwargs=arguments), source
            )
        return _settled(checked, str(source))
    check_name(source, "data", "give a .json, .jsonl, .csv or .parquet file, or a dataset name")
    with _quiet():
        dataset = _read(lambda: datasets.load_dataset(str(source), split=split), source)
    return to_conversations(dataset, name=str(source))


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


def _conversations_of_file(path: str, content: str) -> Iterator[dict[str, Any]]:
    """Rows of :data:`_CHECKED`; of two calls with equal arguments, ``datasets`` makes one."""
    convert = None
    for number, row in enumerate(read_rows(Path(path)), 1):
        convert = convert or _converter(row, path)
        yield _checked(convert, row, path, number)
    if convert is None:
        raise _no_rows(path)


def _code() -> str:
    """Changes with what reads files, so that what an older version parsed is not taken for what this one would."""
    sources = "".join(map(inspect.getsource, (procon.data.files, procon.files, sys.modules[__name__])))
    return hashlib.sha256(sources.encode()).hexdigest()


def to_conversations(dataset: Dataset, *, name: str = "dataset") -> Dataset:
    """Bring a dataset in any known format to the one column ``messages``, of turns with a role and a content.

    Conversations with a blank reply are left out, with a warning.

    Raises:
        ProConError: if it has none of the known columns, or a row holds something else than texts.
    """
    convert = _converter(dataset.column_names, name)
    checked = dataset.map(
        lambda row, index: _checked(convert, row, name, index + 1),
        with_indices=True,
        remove_columns=dataset.column_names,
        features=_CHECKED,
        desc="conversations",
    )
    return _settled(checked, name)


def _converter(columns: Iterable[str], name: str) -> _Converter:
    there = set(columns)
    if "messages" in there:
        return _from_messages
    if {"prompt", "completion"} <= there:
        return _from_prompt_completion
    if {"instruction", "output"} <= there:
        return _from_instruction
    raise ProConError(f"{name!r} has the columns {sorted(there)}; known formats are {_FORMATS}: rename its columns")


def _checked(convert: _Converter, row: dict[str, Any], name: str, number: int) -> dict[str, Any]:
    try:
        messages = convert(row)
    except ProConError as error:
        raise ProConError(f"{name!r}, row {number}: {error}") from None
    return {"messages": messages, "doubt": _doubt(messages)}


def _doubt(messages: list[Message]) -> str | None:
    """What real data have by mistake, and no template refuses."""
    blank = [turn["role"] for turn in messages if not turn["content"].strip()]
    if "assistant" in blank:
        return _BLANK_REPLY
    if "user" in blank:
        return "a blank user turn"
    if any(turn["role"] == following["role"] == "assistant" for turn, following in pairwise(messages)):
        return "two assistant turns in a row"
    return None


def _settled(checked: Dataset, name: str) -> Dataset:
    """The conversations to train on; a warning says how many are doubtful, and which is the first."""
    doubts = checked.data.column("doubt").to_pylist()
    for doubt, count in Counter(filter(None, doubts)).items():
        left_out = doubt == _BLANK_REPLY
        warnings.warn(
            f"{count} of {len(doubts)} conversations of {name!r} have {doubt}, first row {doubts.index(doubt) + 1}, "
            f"and are {'left out' if left_out else 'trained on as they are'}",
            stacklevel=4,
        )
    if _BLANK_REPLY in doubts:
        checked = checked.select([index for index, doubt in enumerate(doubts) if doubt != _BLANK_REPLY])
    if len(checked) == 0:
        raise ProConError(f"{name!r} has no conversation without a blank reply: give ones that say something")
    return checked.remove_columns("doubt")


def _from_messages(row: dict[str, Any]) -> list[Message]:
    return _turns(row, "messages")


def _from_prompt_completion(row: dict[str, Any]) -> list[Message]:
    return _turns(row, "prompt", "user") + _turns(row, "completion", "assistant")


def _from_instruction(row: dict[str, Any]) -> list[Message]:
    texts = _texts(row, "instruction", *(["input"] if row.get("input") else []))
    return [
        {"role": "user", "content": "\n\n".join(texts)},
        {"role": "assistant", "content": _texts(row, "output")[0]},
    ]


def _turns(row: dict[str, Any], column: str, role: str | None = None) -> list[Message]:
    """The messages in a column, or, if a role is given, the one message that a text in it is."""
    value = row.get(column)
    if role is not None and not isinstance(value, list):
        return [{"role": role, "content": _texts(row, column)[0]}]
    if not isinstance(value, list) or not value:
        raise ProConError(f"{column} is {value!r:.60}: give a list of turns")
    for turn in value:
        if not isinstance(turn, dict) or not all(isinstance(turn.get(key), str) for key in ("role", "content")):
            raise ProConError(f"a turn of {column} is {turn!r:.60}: give each a 'role' and a 'content', both texts")
    return [{key: _text(turn[key], f"a {key} of {column}") for key in ("role", "content")} for turn in value]


def _texts(row: dict[str, Any], *columns: str) -> list[str]:
    return [_text(row.get(column), column) for column in columns]


def _text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise ProConError(f"{name} is {value!r:.60}: give a text")
    if len(value) > MAX_TEXT:
        raise ProConError(f"{name} has {len(value)} characters: give at most {MAX_TEXT}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ProConError(f"{name} has half of a surrogate pair: give a text of whole characters") from None
    return value


def safety_conversations() -> Dataset:
    """Built-in safety samples: each malicious prompt of the safety split with a refusal (paper III-C3, IFT_safe)."""
    refusals = builtin_refusals()
    return Dataset.from_list(
        [
            {"messages": _from_instruction({"instruction": prompt, "output": refusals[index % len(refusals)]})}
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
    return datasets.concatenate_datasets([dataset, chosen.cast(dataset.features)]).shuffle(seed=seed)
