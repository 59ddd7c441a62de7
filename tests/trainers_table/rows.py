"""Supervised training: one optimiser step of each trainer in a given mode, as a user would write it.

Each function returns the gradients of CE + ``alpha`` * constraint, or of CE alone where ``alpha`` is 0.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import NamedTuple

import setting
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from datasets import Dataset, IterableDataset
from definition import Sequence
from setting import Mode
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator
from trl import SFTConfig, SFTTrainer

from procon import ProCon, ProConSettings
from procon.data import flattening_collator, padding_collator
from procon.models import find_decoder
from procon.training import ProConConfig, ProConTrainer
from procon.training.sft import ProConSFTConfig, ProConSFTTrainer

RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))

#: Dynamo and AOTAutograd trace as for any backend; a C++ compilation of each graph would take minutes.
COMPILER = "aot_eager"


class Found(NamedTuple):
    """What an optimiser step made.

    Attributes:
        gradients: by parameter, in float64.
        batches: the sequences that were trained on; the penalty is the mean over batches of each one's mean.
    """

    gradients: dict[str, Tensor]
    batches: list[list[Sequence]]


def supervised() -> list[list[Sequence]]:
    """The samples, of which an optimiser step takes the mean over all constrained tokens, however it splits them."""
    return [[(row["input_ids"], [label != -100 for label in row["labels"]]) for row in setting.samples()]]


def dataset(mode: Mode) -> Dataset:
    return Dataset.from_list(setting.packed_samples() if mode.batches == "packed" else setting.samples())


def collator(mode: Mode):
    if mode.batches == "packed":
        return default_data_collator
    return flattening_collator() if mode.batches == "padding-free" else padding_collator(setting.tokenizer())


def batch_size(mode: Mode, rows: int | None = None) -> int:
    """Rows of a micro-batch on one rank, so that one optimiser step takes the whole dataset."""
    return (rows or len(dataset(mode))) // mode.accumulation // WORLD


def assert_wrapped(mode: Mode, model: nn.Module) -> None:
    """The mode is what it says: a table of plain runs would be all green."""
    assert mode.ranks == "1" or torch.distributed.get_world_size() == 2
    assert (mode.ranks == "FSDP2") == any(isinstance(parameter, DTensor) for parameter in model.parameters())


class FirstStep(TrainerCallback):
    """Moves the model off its anchors when training starts, and keeps the gradients of the first optimiser step."""

    def __init__(self, mode: Mode):
        self.mode = mode

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        assert args.world_size == WORLD
        assert_wrapped(self.mode, model)
        setting.move(model)

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients = setting.gradients(model)


def arguments(mode: Mode, folder: Path, rows: int | None = None) -> dict:
    """Of any TrainingArguments."""
    settings = {
        "output_dir": str(folder / "out"),
        "max_steps": 1,
        "max_grad_norm": 0,
        "per_device_train_batch_size": batch_size(mode, rows),
        "gradient_accumulation_steps": mode.accumulation,
        "gradient_checkpointing": mode.checkpointing != "off",
        "gradient_checkpointing_kwargs": {"use_reentrant": mode.checkpointing == "reentrant"},
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    if WORLD > 1:
        settings["ddp_backend"] = "gloo"
    if mode.compiled:
        settings |= {"torch_compile": True, "torch_compile_backend": COMPILER}
    if mode.ranks == "FSDP2":
        settings |= {
            "fsdp": "full_shard auto_wrap",
            "fsdp_config": {"fsdp_version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]},
        }
    return settings


def constraint_settings(mode: Mode, folder: Path, alpha: float, source: str = "recorded") -> dict[str, str | float]:
    """Those of any trainer; one source of anchors alone, ``source`` if the mode has none."""
    settings = {"procon_schedule": f"procon_s:{alpha:g}"}
    if mode.source == "probes":
        settings |= {"procon_probes": str(setting.probe_file(folder)), "procon_probe_weight": setting.PROBE_WEIGHT}
        settings |= {"procon_probe_reply_tokens": setting.REPLY_TOKENS}
        return settings | {"procon_terms": "probes", "procon_probe_every": 1}
    settings |= {"procon_scope": "response", "procon_penalty": "squared"}
    return settings | {"procon_anchors": mode.source or source, "procon_terms": "tokens"}


def trainer(mode: Mode, folder: Path, alpha: float) -> Found:
    step = FirstStep(mode)
    ProConTrainer(
        setting.model(mode.parameters, folder),
        ProConConfig(**arguments(mode, folder), **constraint_settings(mode, folder, alpha)),
        directions=setting.directions(),
        train_dataset=dataset(mode),
        data_collator=collator(mode),
        processing_class=setting.tokenizer(),
        callbacks=[step],
    ).train()
    return Found(step.gradients, supervised())


def sft_arguments(mode: Mode, folder: Path) -> dict:
    settings = arguments(mode, folder)
    if mode.batches == "packed":
        # However many rows TRL packs the samples into, this takes them all.
        samples = len(setting.samples())
        settings |= {"packing": True, "max_length": setting.PACKED_LENGTH, "per_device_train_batch_size": samples}
    if mode.batches == "padding-free":
        settings |= {"padding_free": True, "max_length": None}
    return settings


def sft_trainer(mode: Mode, folder: Path, alpha: float, *, streamed: bool = False) -> Found:
    step = FirstStep(mode)
    settings = constraint_settings(mode, folder, alpha, "live" if streamed else "recorded")
    ProConSFTTrainer(
        setting.model(mode.parameters, folder),
        ProConSFTConfig(**sft_arguments(mode, folder), **settings),
        directions=setting.directions(),
        train_dataset=sft_data(streamed),
        processing_class=setting.tokenizer(),
        callbacks=[step],
    ).train()
    return Found(step.gradients, supervised())


def sft_data(streamed: bool) -> Dataset | IterableDataset:
    """The samples one by one; TRL packs them itself."""
    data = Dataset.from_list(setting.samples())
    return data.to_iterable_dataset() if streamed else data


def prepared_for_checkpointing(model: nn.Module, mode: Mode) -> nn.Module:
    if mode.checkpointing != "off":
        model.gradient_checkpointing_enable({"use_reentrant": mode.checkpointing == "reentrant"})
    return model.train()


def constrained(model: nn.Module, mode: Mode, folder: Path, alpha: float) -> ProCon:
    """The method, for a loop."""
    settings = constraint_settings(mode, folder, alpha)
    return ProCon(
        model,
        setting.tokenizer(),
        ProConSettings(**{name.removeprefix("procon_"): value for name, value in settings.items()}),
        setting.directions(),
        folder=folder,
        progress=False,
    )


def bare_loop(mode: Mode, folder: Path, alpha: float) -> Found:
    model = prepared_for_checkpointing(setting.model(mode.parameters, folder), mode)
    data = dataset(mode)
    wrapped = model
    if mode.ranks == "DDP":
        wrapped = DistributedDataParallel(model)
    if mode.ranks == "FSDP2":
        for block in find_decoder(model).blocks:
            fully_shard(block)
        fully_shard(model, reshard_after_forward=True)
    if mode.compiled:
        wrapped = torch.compile(model, backend=COMPILER)
    procon = constrained(model, mode, folder, alpha)
    share = DistributedSampler(data, WORLD, RANK, shuffle=False)
    loader = procon.prepare(DataLoader(data, batch_size(mode), sampler=share, collate_fn=collator(mode)))
    assert_wrapped(mode, model)
    setting.move(model)
    batches = list(loader)
    labelled = sum((batch["labels"][..., 1:] != -100).sum() for batch in batches)
    if WORLD > 1:
        torch.distributed.all_reduce(labelled)
    procon.begin_step(0, batches)
    for batch in batches:
        procon.begin(batch)
        loss = wrapped(**batch, num_items_in_batch=labelled, use_cache=False).loss + procon.loss()
        # Ranks average their gradients, so that what is a share of a sum is multiplied by their number.
        (loss * WORLD).backward()
    procon.end()
    procon.close()
    return Found(setting.gradients(model), supervised())


def accelerate_loop(mode: Mode, folder: Path, alpha: float) -> Found:
    plugin = None
    if mode.ranks == "FSDP2":
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        )
    AcceleratorState._reset_state(reset_partial_state=True)  # of the rows before
    accelerator = Accelerator(
        cpu=True,
        gradient_accumulation_steps=mode.accumulation,
        fsdp_plugin=plugin,
        dynamo_backend=COMPILER if mode.compiled else None,
    )
    model = prepared_for_checkpointing(setting.model(mode.parameters, folder), mode)
    wrapped, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.0))
    procon = constrained(accelerator.unwrap_model(wrapped), mode, folder, alpha)
    loader = procon.prepare(DataLoader(dataset(mode), batch_size(mode), collate_fn=collator(mode)))
    assert_wrapped(mode, wrapped)
    setting.move(wrapped)
    batches = list(accelerator.prepare(loader))
    labelled = accelerator.reduce(sum((batch["labels"][..., 1:] != -100).sum() for batch in batches))
    procon.begin_step(0, batches)
    for batch in batches:
        with accelerator.accumulate(wrapped):
            procon.begin(batch)
            loss = wrapped(**batch, num_items_in_batch=labelled, use_cache=False).loss + procon.loss()
            # Accelerate divides by the accumulation steps, and ranks average.
            accelerator.backward(loss * accelerator.gradient_accumulation_steps * accelerator.num_processes)
    procon.end(optimizer)
    procon.close()
    return Found(setting.gradients(wrapped), supervised())


ROWS = {
    "Trainer": trainer,
    "SFTTrainer": sft_trainer,
    "streamed SFT": functools.partial(sft_trainer, streamed=True),
    "bare loop": bare_loop,
    "Accelerate": accelerate_loop,
}


def losses_and_weights(run: Trainer) -> tuple[list[float], dict[str, Tensor]]:
    """Those of a whole training."""
    run.train()
    losses = [row["loss"] for row in run.state.log_history if "loss" in row]
    return losses, {name: whole(parameter) for name, parameter in setting.trained(run.model).items()}


def whole(parameter: nn.Parameter) -> Tensor:
    return (parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter).detach().clone()


#: Arguments of a training whose losses and weights are compared.
LONG = {"max_steps": 20, "logging_steps": 1, "learning_rate": 1e-2, "per_device_train_batch_size": 2}


def final_weights(
    trainer_class, config_class, mode: Mode, folder: Path, *, streamed: bool = False, **settings
) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and weights after 20 steps of a transformers or TRL trainer."""
    is_sft = issubclass(trainer_class, SFTTrainer)
    common = (sft_arguments if is_sft else arguments)(mode, folder)
    steps = dict(LONG)
    if mode.batches == "packed":
        steps["per_device_train_batch_size"] = 1
    return losses_and_weights(
        trainer_class(
            setting.model(mode.parameters, folder),
            config_class(**{**common, **steps}, **settings),
            train_dataset=sft_data(streamed) if is_sft else dataset(mode),
            **({"processing_class": setting.tokenizer()} if is_sft else {"data_collator": collator(mode)}),
        )
    )


def _pair(plain: tuple, ours: tuple, **settings) -> tuple:
    return (
        functools.partial(final_weights, *plain, **settings),
        functools.partial(final_weights, *ours, procon_schedule="0", **settings),
    )


#: For the rows that extend a class: theirs and ours.
EXTENDED = {
    "Trainer": _pair((Trainer, TrainingArguments), (ProConTrainer, ProConConfig)),
    "SFTTrainer": _pair((SFTTrainer, SFTConfig), (ProConSFTTrainer, ProConSFTConfig)),
    "streamed SFT": _pair((SFTTrainer, SFTConfig), (ProConSFTTrainer, ProConSFTConfig), streamed=True),
}
