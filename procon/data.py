"""Training data: chat formats in, token ids and response labels out; safety mix and collators."""

from __future__ import annotations

from pathlib import Path

import datasets
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, DataCollatorWithFlattening, PreTrainedTokenizerBase

from procon.chat import Message, pad_token_id, response_mask
from procon.errors import ProConError
from procon.prompts import builtin_prompts, builtin_refusals

IGNORE_INDEX = -100

#: Builders of the ``datasets`` library by file ending.
_FILE_TYPES = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}

_FORMATS = "'messages', 'prompt' + 'completion', or 'instruction' (+ 'input') + 'output'"


def load_conversations(source: str | Path, *, split: str = "train") -> Dataset:
    """Conversations from a JSON, JSONL, CSV or Parquet file, or from a dataset name on the hub.

    Returns:
        A dataset with the one column ``messages``.

    Raises:
        ProConError: if there is no such file, it cannot be read, is empty, or has none of the known columns.
    """
    path = Path(source)
    file_type = _FILE_TYPES.get(path.suffix)
    try:
        if file_type:
            if not path.is_file():
                raise ProConError(f"data file {str(path)!r} does not exist")
            dataset = datasets.load_dataset(file_type, data_files=str(path), split="train")
        else:
            dataset = datasets.load_dataset(str(source), split=split)
    except ProConError:
        raise
    except Exception as error:  # the builders raise errors of many libraries
        reason = str(error.__cause__ or error).splitlines()[0]
        raise ProConError(
            f"data {str(source)!r} cannot be read as {file_type or 'a hub dataset'} ({reason}): "
            "give a .json, .jsonl, .csv or .parquet file, or a dataset name"
        ) from error
    if len(dataset) == 0:
        raise ProConError(f"data {str(source)!r} holds no rows")
    return to_conversations(dataset, name=str(source))


def to_conversations(dataset: Dataset, *, name: str = "dataset") -> Dataset:
    """Bring a dataset in any known format to the one column ``messages``."""
    columns = set(dataset.column_names)
    if "messages" in columns:
        return dataset.select_columns("messages")
    if {"prompt", "completion"} <= columns:
        convert = _from_prompt_completion
    elif {"instruction", "output"} <= columns:
        convert = _from_instruction
    else:
        raise ProConError(
            f"{name!r} has the columns {sorted(columns)}; known formats are {_FORMATS}: rename its columns"
        )
    return dataset.map(convert, remove_columns=dataset.column_names, desc="conversations")


def _from_prompt_completion(row: dict) -> dict[str, list[Message]]:
    prompt, completion = row["prompt"], row["completion"]
    before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    after = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else list(completion)
    return {"messages": before + after}


def _from_instruction(row: dict) -> dict[str, list[Message]]:
    instruction = row["instruction"] + ("\n\n" + row["input"] if row.get("input") else "")
    return {
        "messages": [
            {"role": "user", "content": instruction},
            {"role": "assistant", "content": row["output"]},
        ]
    }


def safety_conversations() -> Dataset:
    """Built-in safety samples: each malicious prompt of the safety split with a refusal (paper III-C3, IFT_safe)."""
    refusals = builtin_refusals()
    return Dataset.from_list(
        [
            _from_instruction({"instruction": prompt, "output": refusals[index % len(refusals)]})
            for index, prompt in enumerate(builtin_prompts("safety").malicious)
        ]
    )


def mix_safety(dataset: Dataset, safety: Dataset, samples: int, *, seed: int) -> Dataset:
    """``dataset`` with ``samples`` rows of ``safety`` shuffled in; rows repeat where there are too few."""
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

    Samples longer than ``max_length`` are cut on the right; one with no response token left is dropped.

    Raises:
        ProConError: if no sample has a response token, or the chat template cannot render a conversation.
    """

    def encode(row: dict) -> dict[str, list[int]]:
        ids, mask = response_mask(tokenizer, row["messages"])
        labels = [token if keep else IGNORE_INDEX for token, keep in zip(ids, mask, strict=True)]
        return {"input_ids": ids[:max_length], "labels": labels[:max_length]}

    if not progress:
        datasets.disable_progress_bars()
    try:
        encoded = dataset.map(encode, remove_columns=dataset.column_names, desc="tokenizing")
        kept = encoded.filter(lambda row: any(label != IGNORE_INDEX for label in row["labels"]), desc="with response")
    finally:
        if not progress:
            datasets.enable_progress_bars()
    if len(kept) == 0:
        raise ProConError(
            f"none of the {len(dataset)} samples has a response token within max_length {max_length}: add assistant "
            "turns, or raise max_length"
        )
    return kept


def padding_collator(tokenizer: PreTrainedTokenizerBase) -> DataCollatorForSeq2Seq:
    """Pads ``input_ids`` and ``labels`` to the longest of the batch."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token_id = pad_token_id(tokenizer)
    return DataCollatorForSeq2Seq(tokenizer, padding=True, label_pad_token_id=IGNORE_INDEX)


def flattening_collator() -> DataCollatorWithFlattening:
    """Joins a batch into one row without padding; ``position_ids`` restart at each sequence."""
    return DataCollatorWithFlattening(return_tensors="pt")
