"""Training data: chat formats in, token ids and response labels out; safety mix and collators."""

from __future__ import annotations

import csv
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, Features, List, Value
from transformers import DataCollatorForSeq2Seq, DataCollatorWithFlattening, PreTrainedTokenizerBase

from procon.chat import Message, builtin_prompts, builtin_refusals, pad_token_id, response_mask
from procon.errors import ProConError
from procon.sequences import IGNORE_INDEX

_FILE_TYPES = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}

_CONVERSATION = Features({"messages": List({"role": Value("string"), "content": Value("string")})})

_FORMATS = "'messages', 'prompt' + 'completion', or 'instruction' (+ 'input') + 'output'"


def load_conversations(source: str | Path, *, split: str = "train") -> Dataset:
    """Conversations from a JSON, JSONL, CSV or Parquet file, or from a dataset name on the hub.

    Returns:
        A dataset with the one column ``messages``.

    Raises:
        ProConError: if there is no such file, it cannot be read, is empty, or has none of the known columns.
    """
    path = Path(source)
    file_type = _FILE_TYPES.get(path.suffix.lower())
    if file_type and not path.is_file():
        raise ProConError(f"data file {str(path)!r} does not exist: check the path")
    if path.is_file():
        if not file_type:
            raise ProConError(f"data file {str(path)!r} is of no known type: give .json, .jsonl, .csv or .parquet")
        if path.stat().st_size == 0:
            raise ProConError(f"data file {str(path)!r} is empty: give one with rows")
    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # the builders log what they raise as well
    try:
        if file_type == "csv":
            dataset = _read_csv(path)
        elif file_type:
            dataset = datasets.load_dataset(file_type, data_files=str(path), split="train")
        else:
            dataset = datasets.load_dataset(str(source), split=split)
    except ProConError:
        raise
    except Exception as error:  # the builders raise errors of many libraries
        cause = error.__cause__ or error
        reason = next(iter(str(cause).splitlines()), type(cause).__name__)
        raise ProConError(
            f"data {str(source)!r} cannot be read as {file_type or 'a hub dataset'} ({reason}): "
            "give a .json, .jsonl, .csv or .parquet file, or a dataset name"
        ) from error
    finally:
        datasets.logging.set_verbosity(verbosity)
    if len(dataset) == 0:
        raise ProConError(f"data {str(source)!r} holds no rows: give one with rows")
    return to_conversations(dataset, name=str(source))


def _read_csv(path: Path) -> Dataset:
    """Every cell as the text it is: the builder would make numbers of answers such as 12, and nothing of "None"."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    for number, row in enumerate(rows, 1):
        if None in row or None in row.values():
            raise ProConError(
                f"data {str(path)!r}, row {number}: not as many cells as columns; quote cells with commas"
            )
    return Dataset.from_list(rows)


def to_conversations(dataset: Dataset, *, name: str = "dataset") -> Dataset:
    """Bring a dataset in any known format to the one column ``messages``, of turns with a role and a content.

    Raises:
        ProConError: if it has none of the known columns, or a row holds something else than texts.
    """
    columns = set(dataset.column_names)
    if "messages" in columns:
        convert = _from_messages
    elif {"prompt", "completion"} <= columns:
        convert = _from_prompt_completion
    elif {"instruction", "output"} <= columns:
        convert = _from_instruction
    else:
        raise ProConError(
            f"{name!r} has the columns {sorted(columns)}; known formats are {_FORMATS}: rename its columns"
        )

    def checked(row: dict[str, Any], index: int) -> dict[str, list[Message]]:
        try:
            return {"messages": convert(row)}
        except ProConError as error:
            raise ProConError(f"{name!r}, row {index + 1}: {error}") from None

    return dataset.map(
        checked,
        with_indices=True,
        remove_columns=dataset.column_names,
        features=_CONVERSATION,
        desc="conversations",
    )


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
    value = row[column]
    if role is not None and not isinstance(value, list):
        return [{"role": role, "content": _texts(row, column)[0]}]
    if not isinstance(value, list) or not value:
        raise ProConError(f"{column} is {value!r:.60}: give a list of turns")
    for turn in value:
        if not isinstance(turn, dict) or not all(isinstance(turn.get(key), str) for key in ("role", "content")):
            raise ProConError(f"a turn of {column} is {turn!r:.60}: give each a 'role' and a 'content', both texts")
    return [{"role": turn["role"], "content": turn["content"]} for turn in value]


def _texts(row: dict[str, Any], *columns: str) -> list[str]:
    for column in columns:
        if not isinstance(row[column], str):
            raise ProConError(f"{column} is {row[column]!r:.60}: give a text")
    return [row[column] for column in columns]


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
    rows = [index % len(safety) for index in range(samples)]
    chosen = safety.shuffle(seed=seed).select(rows)
    return datasets.concatenate_datasets([dataset, chosen.cast(dataset.features)]).shuffle(seed=seed)


def tokenize_conversations(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = None,
    progress: bool = True,
) -> Dataset:
    """Token ids, and labels on the assistant's tokens only: columns ``input_ids`` and ``labels``.

    Samples longer than ``max_length`` are cut on the right; one with no response token left is dropped, with a warning.

    Raises:
        ProConError: if no sample has a response token, or the chat template cannot render a conversation.
    """
    if max_length is not None and max_length < 1:
        raise ProConError(f"max_length is {max_length}: give 1 or more")

    def encode(row: dict[str, Any]) -> dict[str, list[int]]:
        ids, mask = response_mask(tokenizer, row["messages"])
        labels = [token if keep else IGNORE_INDEX for token, keep in zip(ids, mask, strict=True)]
        return {"input_ids": ids[:max_length], "labels": labels[:max_length]}

    with _progress_bars(progress):
        encoded = dataset.map(encode, remove_columns=dataset.column_names, desc="tokenizing")
        kept = encoded.filter(lambda row: any(label != IGNORE_INDEX for label in row["labels"]), desc="with response")
    if len(kept) == 0:
        raise ProConError(
            f"none of the {len(dataset)} samples has a response token within max_length {max_length}: add assistant "
            "turns, or raise max_length"
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
