"""What makes two trainings the same: what a resumed one must share with the one that it goes on from."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers import TrainingArguments

from procon.method.record import check_resumed
from procon.models import frozen_hash, weights_hash

logger = logging.getLogger(__name__)

#: What to do about a fact that differs, beyond giving the same settings.
_REMEDIES = {
    "base_model": "load the model that the run began with",
    "model_configuration": "load the model that the run began with",
    "trained_parameters": "train the same parameters, with an adapter of the same settings",
    "training_data": "give the same rows in the same order",
    "samples_per_step": "keep ranks times batch size times gradient accumulation steps as it was",
    "reference_model": "give the reference model that the run began with",
}

#: Of a model's configuration, what the computation does not depend on.
_NAMES = {"architectures", "dtype", "torch_dtype", "transformers_version", "use_cache", "name_or_path"}

#: Of an adapter's.
_ADAPTER_NAMES = {"base_model_name_or_path", "inference_mode", "peft_version", "revision", "auto_mapping"}

#: Arguments on which the weights do not depend, or that are compared by what comes of them: the model, its rows. When
#: to evaluate is none of them: dropout draws on from where an evaluation leaves off.
_NO_MATTER = frozenset(
    """
    output_dir do_train do_eval do_predict resume_from_checkpoint local_rank debug skip_memory_metrics
    activation_checkpointing gradient_checkpointing use_cache torch_empty_cache_steps
    dataloader_pin_memory dataloader_prefetch_factor dataloader_multiprocessing_context ddp_timeout

    logging_strategy logging_steps logging_first_step log_on_each_node logging_nan_inf_filter log_level
    log_level_replica disable_tqdm report_to run_name project trackio_space_id trackio_bucket_id
    trackio_static_space_id include_num_input_tokens_seen

    per_device_eval_batch_size prediction_loss_only eval_do_concat_batches eval_use_gather_object
    eval_accumulation_steps include_for_metrics batch_eval_metrics bf16_full_eval fp16_full_eval

    save_strategy save_steps save_total_limit save_only_model save_on_each_node enable_jit_checkpoint
    restore_callback_states_from_checkpoint

    push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision

    model_init_kwargs trust_remote_code eos_token pad_token dataset_num_proc eval_packing num_generations_eval
    precompute_ref_batch_size log_completions log_multimodal num_completions_to_print log_unique_prompts
    log_completions_hub_repo vllm_server_base_url vllm_server_host vllm_server_port vllm_server_timeout
    vllm_group_port vllm_gpu_memory_utilization vllm_enable_sleep_mode
    """.split()  # noqa: SIM905  # formatted, a list has a line per name
)


def run_facts(
    args: TrainingArguments,
    model: nn.Module,
    dataset: Any,
    *,
    precision: str,
    together: int = 1,
    reads_data: bool,
    reference: nn.Module | None = None,
) -> dict[str, Any]:
    """What must not change. If parameters are sharded, all ranks must call.

    Takes a pass over the weights that do not train, and one over the rows.

    Args:
        precision: that of Accelerate's autocast, ``"no"`` without.
        together: how many ranks compute a batch together.
        reads_data: whether rows may be read that are made as they are read, as those of a dataset other than
            :class:`datasets.Dataset`.
        reference: a model of its own that the loss compares with, if it is not sharded.
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
        "neftune_noise_alpha": args.neftune_noise_alpha,
        "reference_model": None if reference is None else weights_hash(reference),
    }


def run_arguments(args: TrainingArguments, model: nn.Module, **functions: Any) -> dict[str, Any]:
    """What may change, with a warning: all arguments but those that do not matter, and ``functions`` by their names."""
    values = {
        name: value
        for name, value in args.to_dict().items()
        if name not in _NO_MATTER and not name.startswith("procon_")  # which the method compares itself
    }
    values |= {
        "ranks": args.world_size,
        "attention": getattr(getattr(model, "config", None), "_attn_implementation", None),
        **{name: getattr(made, "__qualname__", type(made).__name__) for name, made in functions.items()},
    }
    # As a record gives them back, which has no number for infinity.
    return json.loads(json.dumps(values, default=_plain), parse_constant=str)


def check_same_run(record: dict[str, Any], run: dict[str, Any], arguments: dict[str, Any], checkpoint: str) -> None:
    """Raise ProConError for a fact that differs from those of the record, and warn of arguments that do."""
    check_resumed(record.get("run", {}), run, checkpoint, _REMEDIES)
    # A run that is not interrupted skips no data.
    before = {**record.get("arguments", {}), "ignore_data_skip": False}
    changed = [
        f"{name} {before.get(name)!r} to {arguments.get(name)!r}"
        for name in {**before, **arguments}
        if before.get(name) != arguments.get(name)
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
