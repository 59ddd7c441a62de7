"""``procon train``: data and model become a trainer, and that trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from accelerate import PartialState
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from rich.console import Console
from rich.text import Text
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.integrations import get_reporting_integration_callbacks

from procon.cli.arguments import TrainArguments
from procon.data import (
    flattening_collator,
    load_conversations,
    mix_in,
    own_replies,
    padding_collator,
    parse_columns,
    safety_conversations,
    tokenize_conversations,
)
from procon.errors import ProConError, printable
from procon.files import check_writable
from procon.models import load_model, spread
from procon.settings import PAPER_RECIPE
from procon.training import DriftCallback, ProConConfig, ProConTrainer
from procon.training.config import check_probe_file
from procon.training.run_folder import has_checkpoints


def train(arguments: TrainArguments, config: ProConConfig) -> None:
    """``procon train``"""
    output = Path(cast(str, config.output_dir))
    # What would show only after data and a model are read.
    check_probe_file(config.procon_settings())
    for folder in filter(None, (output, config.procon_settings().anchors_dir)):
        check_writable(Path(folder) / "any")
    if not arguments.resume and has_checkpoints(output):  # which this training would write over
        raise ProConError(
            f"output_dir {str(output)!r} has checkpoints of a training: give --resume to go on from the latest, "
            "another output_dir, or delete them"
        )
    if arguments.resume and not has_checkpoints(output):
        raise ProConError(f"no complete checkpoint in {str(output)!r} to resume from: start afresh, without --resume")
    try:
        get_reporting_integration_callbacks(
            config.report_to
        )  # made by the Trainer alone: some lock or start what they log to
    except ValueError as error:
        raise ProConError(f"report_to {config.report_to}: {error}") from error
    conversations, evaluation, safety = _conversations(arguments, config.seed)
    model, tokenizer = _model(arguments, config)
    if arguments.own_replies:
        own = own_replies(model, tokenizer, chat=arguments.chat())
        conversations = mix_in(conversations, own, arguments.own_replies, seed=config.seed)
    settings: dict[str, Any] = {
        "chat": arguments.chat(),
        "max_length": arguments.max_length,
        "overlong": arguments.overlong,
    }
    dataset = tokenize_conversations(conversations, tokenizer, **settings)
    is_flash = "flash" in (model.config._attn_implementation or "")
    try:
        trainer = ProConTrainer(
            model,
            config,
            directions=arguments.directions,
            chat=arguments.chat(),
            train_dataset=dataset,
            eval_dataset=tokenize_conversations(evaluation, tokenizer, **settings) if evaluation else None,
            data_collator=flattening_collator(bounds=is_flash) if arguments.flatten else padding_collator(tokenizer),
            processing_class=tokenizer,
        )
    except (ValueError, ImportError, RuntimeError) as error:  # what transformers finds wrong with its arguments
        raise ProConError(str(error)) from error
    trainer.mixed_in = {"safety samples": safety, "of the starting model's own replies": arguments.own_replies}
    if arguments.drift_steps:
        trainer.add_callback(DriftCallback(trainer, tokenizer, steps=arguments.drift_steps))
    console = Console(quiet=config.process_index != 0, soft_wrap=True)
    console.print(Text(printable(_plan(trainer, arguments.model))))
    trainer.train(resume_from_checkpoint=arguments.resume)
    trainer.save_model()
    trainer.save_state()
    name = printable(str(output))
    console.print(Text(f"{_result(trainer)} Written: {name}."))
    console.print(Text(f"Measure it: procon eval {name}; then: procon report {name}"))
    # Ranks leave together: one that is gone early takes the others' connections with it.
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()
    PartialState().destroy_process_group()


def _conversations(arguments: TrainArguments, seed: int) -> tuple[Dataset, Dataset | None, int]:
    """What is trained on, safety samples included, what is evaluated on, and how many safety samples there are."""
    columns = parse_columns(arguments.data_columns)
    of_hub: dict[str, Any] = {"config": arguments.data_config, "revision": arguments.data_revision}
    data = load_conversations(arguments.data, split=arguments.data_split, columns=columns, **of_hub)
    count = arguments.safety_samples
    if count or arguments.safety_data:
        safety = load_conversations(arguments.safety_data) if arguments.safety_data else safety_conversations()
        count = count or len(safety)
        data = mix_in(data, safety, count, seed=seed)
    split = {"split": arguments.eval_split} if arguments.eval_split else {}
    if arguments.eval_data:
        return data, load_conversations(arguments.eval_data, columns=columns, **split), count
    return data, load_conversations(arguments.data, columns=columns, **of_hub, **split) if split else None, count


def _model(arguments: TrainArguments, config: ProConConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, with what is to train requiring gradients: all weights, the adapter that it has, or a new one."""
    loading = arguments.loading()
    loading["attn_implementation"] = loading["attn_implementation"] or "auto"
    if arguments.method == "full" and arguments.dtype == "auto":
        loading["dtype"] = "float32"
    if config.use_cpu and loading["device_map"] is None:
        loading["device_map"] = "cpu"
    model, tokenizer = load_model(arguments.model, **loading)
    set_seed(config.seed)  # of the new adapter
    if {"cpu", "disk"} & set(devices := spread(model)):
        raise ProConError(
            f"the model is spread over {', '.join(devices)}, and what lies in memory or on the disk does not train: "
            "load it in fewer bits (--load_in_4bit), or share it among processes (accelerate launch --use_fsdp)"
        )
    if arguments.method == "full":
        if isinstance(model, PeftModel):
            raise ProConError(
                f"model {arguments.model!r} is a LoRA folder: merge it into its base, or use --method lora"
            )
        return model, tokenizer
    if getattr(model, "is_quantized", False):
        prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)  # which the Trainer switches on
    if isinstance(model, PeftModel):
        model.set_adapter(cast(str, model.active_adapter))  # its only one; loaded for inference, it was frozen
        return model, tokenizer
    return cast(PreTrainedModel, _with_adapter(model, arguments)), tokenizer  # it takes from its base what it lacks


def _with_adapter(model: PreTrainedModel, arguments: TrainArguments) -> Any:
    targets: Any = arguments.lora_targets
    if targets == "auto":  # the paper's if the model has them all, else PEFT's for the family
        there = {name.rpartition(".")[2] for name, _ in model.named_modules()}
        targets = list(PAPER_RECIPE.lora_targets) if there.issuperset(PAPER_RECIPE.lora_targets) else None
    elif targets != "all-linear":
        targets = [name.strip() for name in targets.split(",")]
    lora = LoraConfig(
        r=arguments.lora_r,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, lora)
    except ValueError as error:
        raise ProConError(
            f"lora_targets {arguments.lora_targets!r} do not fit the model ({error}): try all-linear"
        ) from error


def _plan(trainer: ProConTrainer, name: str) -> str:
    """What trains, and whether the constraint is on."""
    procon = trainer.procon
    model = cast(PreTrainedModel, trainer.model)
    trained, total = model.num_parameters(only_trainable=True), model.num_parameters()
    samples = len(cast(Dataset, trainer.train_dataset))
    constraint = "without the constraint"
    if procon.active:
        constraint = f"under alpha {procon.schedule} at the {' and '.join(term.name for term in procon.terms)}"
    return f"{name}: {trained:,} of {total:,} parameters train on {samples:,} samples, {constraint}."


def _result(trainer: ProConTrainer) -> str:
    """What the constraint did, as measured."""
    procon = trainer.procon
    if not procon.active:
        return "Trained without the constraint."
    did, constraint = procon.did(trainer.state.global_step), procon.constraint
    blocks = ""
    if constraint is not None:
        blocks = f", which acted on {len(did['blocks_acted'])} of its {len(constraint.blocks)} blocks"
    return (
        f"{did['constrained_steps']} of {did['steps']} steps were under the constraint{blocks}; mean penalty "
        f"{did['mean_penalty']:.3g} before alpha."
    )
