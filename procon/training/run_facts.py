"""What makes two trainings the same: what a resumed one must share with the one that it goes on from."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers import TrainingArguments

from procon.anchors.starting_state import check_resumed
from procon.models import frozen_hash

logger = logging.getLogger(__name__)

#: What to do about a fact that differs, beyond giving the same settings.
_REMEDIES = {
    "base_model": "load the model that the run began with",
    "model_configuration": "load the model that the run began with",
    "trained_parameters": "train the same parameters, with an adapter of the same settings",
    "training_data": "give the same rows in the same order",
    "samples_per_step": "keep ranks times batch size times gradient accumulation steps as it was",
}

#: Of a model's configuration, what the computation does not depend on.
_NAMES = {"architectures", "dtype", "torch_dtype", "transformers_version", "use_cache", "name_or_path"}

#: Of an adapter's.
_ADAPTER_NAMES = {"base_model_name_or_path", "inference_mode", "peft_version", "revision", "auto_mapping"}

#: Arguments that a run may change on resuming, though it then ends in other weights.
_ARGUMENTS = (
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "label_smoothing_factor",
    "max_steps",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "dataloader_drop_last",
)


def run_facts(
    args: TrainingArguments, model: nn.Module, dataset: Any, *, precision: str, together: int = 1, reads_data: bool
) -> dict[str, Any]:
    """What must not change. If parameters are sharded, all ranks must call.

    Takes a pass over the weights that do not train, and one over the rows.

    Args:
        precision: that of Accelerate's autocast, ``"no"`` without.
        together: how many ranks compute a batch together.
        reads_data: whether rows may be read that are made as they are read, as those of a dataset other than
            :class:`datasets.Dataset`.
    """
    return {
        "trained_parameters": _hash([_trained(model), _adapters(model)]),
        "model_configuration": _hash([_configuration(model)]),
        "base_model": frozen_hash(model),
        "training_data": _hash(_rows(dataset, reads_data)),
        "seed": args.seed,
        "data_seed": args.data_seed,
        "samples_per_step": (
            args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size // together
        ),
        "precision": precision,
        "optimizer": str(getattr(args.optim, "value", args.optim)),
    }


def run_arguments(args: TrainingArguments, model: nn.Module, collator: Any) -> dict[str, Any]:
    """What may change, with a warning."""
    values = {name: getattr(args, name, None) for name in _ARGUMENTS}
    values |= {
        "ranks": args.world_size,
        "attention": getattr(getattr(model, "config", None), "_attn_implementation", None),
        "data_collator": getattr(collator, "__qualname__", type(collator).__name__),
    }
    return json.loads(json.dumps(values, default=_plain))  # as a record gives them back


def check_same_run(record: dict[str, Any], run: dict[str, Any], arguments: dict[str, Any], checkpoint: str) -> None:
    """Raise ProConError for a fact that differs from those of the record, and warn of arguments that do."""
    check_resumed(record.get("run", {}), run, checkpoint, _REMEDIES)
    before = record.get("arguments", {})
    changed = [
        f"{name} {before.get(name)!r} to {value!r}" for name, value in arguments.items() if before.get(name) != value
    ]
    if changed:
        logger.warning(
            "%s was trained with other arguments, so the resumed run may end in other weights than one that was "
            "not interrupted, and the optimiser may go on with the old ones: %s",
            checkpoint,
            ", ".join(changed),
        )


def _configuration(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_dict"):
        return None
    # The Trainer itself sets the tokens to those of the tokenizer.
    return {
        name: value
        for name, value in config.to_dict().items()
        if name not in _NAMES and "token_id" not in name and name[0] != "_"
    }


def _trained(model: nn.Module) -> list[str]:
    return sorted(
        f"{name}{tuple(getattr(parameter, 'ds_shape', parameter.shape))}{parameter.dtype}"
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    )


def _adapters(model: nn.Module) -> Any:
    configs: dict[str, Any] = getattr(model, "peft_config", None) or {}
    return {
        adapter: {name: value for name, value in config.to_dict().items() if name not in _ADAPTER_NAMES}
        for adapter, config in configs.items()
        if hasattr(config, "to_dict")
    }


def _rows(dataset: Any, reads_data: bool) -> Iterable[Any]:
    if not hasattr(dataset, "__len__"):
        return
    if hasattr(dataset, "with_format"):  # of the library datasets, which need not be there
        # As they lie on the disk: a transform may draw at random.
        yield from dataset.with_format(None).iter(batch_size=1000)
    elif reads_data:
        for number in range(len(dataset)):
            yield dataset[number]


def _hash(values: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for value in values:
        digest.update(json.dumps(value, sort_keys=True, default=_plain).encode())
    return digest.hexdigest()[:16]


def _plain(value: Any) -> Any:
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    if hasattr(value, "tolist"):
        return value.tolist()
    # Of others not their text, in which there may be an address.
    return value.value if hasattr(value, "value") else type(value).__name__
