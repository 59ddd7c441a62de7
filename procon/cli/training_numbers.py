"""Training arguments that transformers itself would take, and trip over once the model is loaded, or later."""

from __future__ import annotations

import math
from dataclasses import fields

from transformers import TrainingArguments

from procon.errors import ProConError

#: The least value of each.
_LEAST = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "learning_rate": 0,
    "weight_decay": 0,
    "max_grad_norm": 0,
    "warmup_steps": 0,
    "adam_epsilon": 0,
    "adam_beta1": 0,
    "adam_beta2": 0,
    "label_smoothing_factor": 0,
    "logging_steps": 0,
    "save_steps": 0,
    "save_total_limit": 0,
    "dataloader_num_workers": 0,
    "max_steps": -1,
    "seed": 0,
    "data_seed": 0,
}

#: Whole numbers of more digits are no float, and no count of anything.
_LARGEST = 1e300

#: What each has to stay below.
_BELOW = {"adam_beta1": 1, "adam_beta2": 1, "label_smoothing_factor": 1, "seed": 2**32, "data_seed": 2**32}


def check(config: TrainingArguments) -> None:
    """Raise ProConError if a number is one that no training can have."""
    for field in fields(config):
        value = getattr(config, field.name)
        if isinstance(value, list | str) and field.name.endswith("_kwargs"):
            raise ProConError(f"{field.name} is {value!r:.60}: give a mapping, such as {{num_cycles: 2}}")
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if not abs(value) < _LARGEST:
            raise ProConError(f"{field.name} is {value!s:.40}: give a finite number")
        if value < _LEAST.get(field.name, -math.inf):
            raise ProConError(f"{field.name} is {value}: give {_LEAST[field.name]} or more")
        if value >= _BELOW.get(field.name, math.inf):
            raise ProConError(f"{field.name} is {value}: give less than {_BELOW[field.name]}")
    _check_trackers(config)


def _check_trackers(config: TrainingArguments) -> None:
    from transformers.integrations import get_available_reporting_integrations

    known = get_available_reporting_integrations()
    for name in config.report_to or ():
        if name not in known:
            there = ", ".join(["none", *known])
            raise ProConError(f"report_to is {name!r}, which is not installed or not known: choose among {there}")
