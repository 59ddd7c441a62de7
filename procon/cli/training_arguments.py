"""Of transformers' TrainingArguments those that ``procon train --help`` lists; the command takes all of them.

Written out here, with texts of our own, as importing them takes seconds. A test compares names, types and defaults with
those of transformers.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from procon.cli.arguments import _option
from procon.settings import PAPER_RECIPE

_LENGTH, _OPTIMISER, _MEMORY, _SAVING = "length and batches", "optimiser", "precision and memory", "saving and logging"


@dataclass
class ShownTrainingArguments:
    """The settings of a training that are not the constraint's."""

    num_train_epochs: float = _option(3.0, "Times through the data.", _LENGTH)
    max_steps: int = _option(-1, "Optimiser steps, in place of epochs; -1 leaves it to the epochs.", _LENGTH)
    per_device_train_batch_size: int = _option(8, "Samples per device and forward.", _LENGTH)
    gradient_accumulation_steps: int = _option(1, "Forwards per optimiser step.", _LENGTH)
    seed: int = _option(42, "Seed of a new adapter and of the order of the data.", _LENGTH)

    learning_rate: float = _option(PAPER_RECIPE.learning_rate, "Highest learning rate.", _OPTIMISER)
    lr_scheduler_type: str = _option(
        "linear", "Its course: linear, cosine, constant, constant_with_warmup, or another of transformers'.", _OPTIMISER
    )
    warmup_steps: float = _option(0, "Steps in which it rises; below 1, a share of all steps.", _OPTIMISER)
    optim: str = _option(
        "adamw_torch_fused", "Optimiser, such as adamw_torch, adamw_8bit, paged_adamw_8bit or adafactor.", _OPTIMISER
    )
    weight_decay: float = _option(0.0, "Weight decay.", _OPTIMISER)
    max_grad_norm: float = _option(1.0, "Gradients are scaled down to this norm; 0 for never.", _OPTIMISER)

    bf16: bool = _option(False, "Compute in bfloat16 from weights in float32.", _MEMORY)
    gradient_checkpointing: bool | None = _option(
        None, "Compute activations again in backward, which takes less memory and more time.", _MEMORY
    )
    use_cpu: bool = _option(False, "Train on the CPU, whatever else there is.", _MEMORY)
    dataloader_num_workers: int = _option(0, "Processes that load data; 0 loads them in this one.", _MEMORY)

    output_dir: str = _option("procon-output", "Folder for the model, checkpoints and the log.", _SAVING)
    save_strategy: Literal["no", "steps", "epoch", "best"] = _option("steps", "When to save a checkpoint.", _SAVING)
    save_steps: float = _option(500, "Steps from one checkpoint to the next; below 1, a share of all steps.", _SAVING)
    save_total_limit: int | None = _option(None, "Checkpoints to keep; all if not given.", _SAVING)
    logging_steps: float = _option(10, "Steps from one row of the log to the next.", _SAVING)
    report_to: str = _option("none", "Tracker, such as tensorboard or wandb; all for those installed.", _SAVING)
    run_name: str | None = _option(None, "Name of the run in a tracker.", _SAVING)
    push_to_hub: bool = _option(False, "Upload the model to the hub when it is saved.", _SAVING)
    hub_model_id: str | None = _option(None, "Its name there; that of the output folder if not given.", _SAVING)


#: The paper's recipe (section IV-A2) and quiet defaults, as far as TrainingArguments' own differ.
_OWN_DEFAULTS = ("output_dir", "learning_rate", "logging_steps", "report_to")

OWN_DEFAULTS: dict[str, Any] = {
    field.name: field.default for field in fields(ShownTrainingArguments) if field.name in _OWN_DEFAULTS
}


@dataclass
class OtherProConArguments:
    """Settings of ``ProConArguments`` that are neither the constraint's nor of the source of anchors."""

    procon_anchors_dir: str | None = _option(
        None, "Where initial projections are kept; OUTPUT_DIR/_anchors if not given."
    )
    procon_overwrite: bool = _option(
        False, "Delete the model and the checkpoints that another training left in the output folder."
    )
