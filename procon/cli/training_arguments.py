"""Of transformers' TrainingArguments those that ``procon train --help`` lists; the command takes all of them.

Written out here, with texts of our own, as importing them takes seconds. A test compares names, types and defaults with
those of transformers.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from procon.cli.arguments import EVALUATION
from procon.cli.options import option
from procon.settings import PAPER_RECIPE

_LENGTH, _OPTIMISER, _MEMORY, _SAVING = "length and batches", "optimiser", "precision and memory", "saving and logging"


@dataclass
class ShownTrainingArguments:
    """The settings of a training that are not the constraint's."""

    num_train_epochs: float = option(3.0, "Times through the data.", _LENGTH)
    max_steps: int = option(-1, "Optimiser steps, in place of epochs; -1 leaves it to the epochs.", _LENGTH)
    per_device_train_batch_size: int = option(8, "Samples per device and forward.", _LENGTH)
    gradient_accumulation_steps: int = option(1, "Forwards per optimiser step.", _LENGTH)
    seed: int = option(42, "Seed of a new adapter and of the order of the data.", _LENGTH)

    learning_rate: float = option(PAPER_RECIPE.learning_rate, "Highest learning rate.", _OPTIMISER)
    lr_scheduler_type: str = option(
        "linear", "Its course: linear, cosine, constant, constant_with_warmup, or another of transformers'.", _OPTIMISER
    )
    warmup_steps: float = option(0, "Steps in which it rises; below 1, a share of all steps.", _OPTIMISER)
    optim: str = option(
        "adamw_torch_fused", "Optimiser, such as adamw_torch, adamw_8bit, paged_adamw_8bit or adafactor.", _OPTIMISER
    )
    weight_decay: float = option(0.0, "Weight decay.", _OPTIMISER)
    max_grad_norm: float = option(1.0, "Gradients are scaled down to this norm; 0 for never.", _OPTIMISER)

    bf16: bool = option(False, "Compute in bfloat16 from weights in float32.", _MEMORY)
    gradient_checkpointing: bool | None = option(
        None, "Compute activations again in backward, which takes less memory and more time.", _MEMORY
    )
    use_cpu: bool = option(False, "Train on the CPU, whatever else there is.", _MEMORY)
    dataloader_num_workers: int = option(0, "Processes that load data; 0 loads them in this one.", _MEMORY)

    eval_strategy: Literal["no", "steps", "epoch"] = option("no", "When to evaluate.", EVALUATION)
    eval_steps: float | None = option(
        None, "Steps from one evaluation to the next; those of the log if not given.", EVALUATION
    )
    per_device_eval_batch_size: int = option(8, "Samples per device and forward of an evaluation.", EVALUATION)
    load_best_model_at_end: bool = option(
        False, "Keep the checkpoint with the lowest loss on those data, not the last one.", EVALUATION
    )

    output_dir: str = option("procon-output", "Folder for the model, checkpoints and the log.", _SAVING)
    save_strategy: Literal["no", "steps", "epoch", "best"] = option("steps", "When to save a checkpoint.", _SAVING)
    save_steps: float = option(500, "Steps from one checkpoint to the next; below 1, a share of all steps.", _SAVING)
    save_total_limit: int | None = option(None, "Checkpoints to keep; all if not given.", _SAVING)
    logging_steps: float = option(10, "Steps from one row of the log to the next.", _SAVING)
    report_to: str = option("none", "Tracker, such as tensorboard or wandb; all for those installed.", _SAVING)
    run_name: str | None = option(None, "Name of the run in a tracker.", _SAVING)
    push_to_hub: bool = option(False, "Upload the model to the hub when it is saved.", _SAVING)
    hub_model_id: str | None = option(None, "Its name there; that of the output folder if not given.", _SAVING)


#: The paper's recipe (section IV-A2) and quiet defaults, as far as TrainingArguments' own differ.
_OWN_DEFAULTS = ("output_dir", "learning_rate", "logging_steps", "report_to")

OWN_DEFAULTS: dict[str, Any] = {
    field.name: field.default for field in fields(ShownTrainingArguments) if field.name in _OWN_DEFAULTS
}
