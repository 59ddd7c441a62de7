"""What trains in ``procon train``: all weights, an adapter that is there, or a new one; and the merged model."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from procon.cli.arguments import TrainArguments
from procon.cli.contradictions import OF_ADAPTERS
from procon.errors import ProConError
from procon.files import whole_folder
from procon.models import load_model, spread
from procon.settings import PAPER_RECIPE

#: Of the output folder, the model that its adapter was merged into.
MERGED = "merged"


def trainable(model: PreTrainedModel, arguments: TrainArguments) -> PreTrainedModel:
    """``model`` with what is to train requiring gradients."""
    if {"cpu", "disk"} & set(devices := spread(model)):
        raise ProConError(
            f"the model is spread over {', '.join(devices)}, and what lies in memory or on the disk does not train: "
            "load it in fewer bits (--load_in_4bit), or share it among processes (--accelerate_config fsdp2)"
        )
    if arguments.method == "full":
        if isinstance(model, PeftModel):
            raise ProConError(
                f"model {arguments.model!r} is a LoRA folder: merge it into its base, or use --method lora"
            )
        return model
    if getattr(model, "is_quantized", False):
        prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)  # which the Trainer switches on
    if isinstance(model, PeftModel):
        for name in OF_ADAPTERS:
            if name in arguments.given:
                raise ProConError(f"{name} is of a new adapter, and model {arguments.model!r} is one: leave it out")
        model.set_adapter(cast(str, model.active_adapter))  # its only one; loaded for inference, it was frozen
        return model
    try:
        adapted = get_peft_model(model, _lora(model, arguments))
        return cast(PreTrainedModel, adapted)  # it takes from its base what it lacks
    except ProConError:
        raise
    except ValueError as error:
        raise ProConError(
            f"lora_targets {arguments.lora_targets!r} do not fit the model ({error}): try all-linear"
        ) from error


def _lora(model: PreTrainedModel, arguments: TrainArguments) -> LoraConfig:
    given = arguments.lora_targets
    targets = None if given == "auto" else _names(given)  # None leaves them to PEFT
    if given == "auto" and {name.rpartition(".")[2] for name, _ in model.named_modules()} >= {
        *PAPER_RECIPE.lora_targets
    }:
        targets = list(PAPER_RECIPE.lora_targets)
    return LoraConfig(
        r=arguments.lora_r,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        target_modules=given if given == "all-linear" else targets,
        modules_to_save=_names(arguments.modules_to_save) if arguments.modules_to_save else None,
        use_dora=arguments.use_dora,
        use_rslora=arguments.use_rslora,
        task_type="CAUSAL_LM",
    )


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def write_merged(output: Path, tokenizer: PreTrainedTokenizerBase, arguments: TrainArguments) -> Path:
    """Merge the adapter in ``output`` into its base, both loaded again: what trained may be sharded."""
    folder = output / MERGED
    model, _ = load_model(output, **{**arguments.loading(), "device_map": "cpu"})
    merged = cast(PeftModel, model).merge_and_unload()
    with whole_folder(folder) as partial:
        merged.save_pretrained(partial)  # pyright: ignore[reportCallIssue]  # PEFT does not say what it returns
        tokenizer.save_pretrained(partial)
    return folder
