"""The plain Trainer, or ProConTrainer under some settings, on a batch of made-up samples: what is timed beside what."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from procon import Directions, ProConConfig, ProConTrainer


def make_trainer(
    settings: Mapping[str, Any] | None,
    model: nn.Module,
    batch: Mapping[str, Tensor],
    tokenizer: Any,
    collator: Callable[..., Any],
    folder: str,
    *,
    callbacks: list[Any] | None = None,
    **arguments: Any,
) -> Trainer:
    """A trainer of ``model`` on the rows of ``batch``, all in each step; plain if ``settings`` are None.

    Directions are random: their values do not change what a step costs.
    """
    names = ("input_ids", "labels")
    rows = [dict(zip(names, row, strict=True)) for row in zip(*(batch[name].tolist() for name in names), strict=True)]
    common: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(dir=folder),
        "per_device_train_batch_size": len(rows),
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        **arguments,
    }
    given: dict[str, Any] = {
        "train_dataset": Dataset.from_list(rows),
        "data_collator": collator,
        "processing_class": tokenizer,
        "callbacks": callbacks,
    }
    if settings is None:
        return Trainer(model, TrainingArguments(**common), **given)
    config: Any = model.config
    ours = ProConConfig(**common, **settings)
    if ours.procon_settings().has_tokens:
        vectors = torch.randn(config.num_hidden_layers, config.hidden_size)
        given["directions"] = Directions.from_vectors(model, vectors, name="random")
    return ProConTrainer(model, ours, **given)
