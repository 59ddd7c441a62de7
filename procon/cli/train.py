"""``procon train``: what it is given becomes a job, the job becomes a trainer, and that trains."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from rich.console import Console
from rich.text import Text
from transformers import EarlyStoppingCallback, PreTrainedModel, PreTrainedTokenizerBase, Trainer, set_seed

from procon.cli.adapters import MERGED, trainable, write_merged
from procon.cli.arguments import TrainArguments
from procon.cli.chat import chat_settings
from procon.cli.preface import Preface
from procon.data import (
    flattening_collator,
    load_conversations,
    mix_safety,
    padding_collator,
    parse_columns,
    safety_conversations,
    tokenize_conversations,
)
from procon.directions import DIRECTIONS_FILE, Directions
from procon.errors import ProConError, printable
from procon.files import check_writable
from procon.method.ranks import on_main
from procon.models import check_name, find_decoder, load_model
from procon.schedule import AlphaSchedule
from procon.training import DriftCallback, ProConConfig, ProConTrainer
from procon.training.config import check_probe_file
from procon.training.run_folder import Checkpoint, has_checkpoints, latest, locked, output_folder


@dataclass(frozen=True)
class _Job:
    """What ``procon train`` needs in addition to a model; found, and found good, before one is loaded.

    Attributes:
        config: the training arguments.
        conversations: what is trained on, safety samples included.
        evaluation: what is evaluated on while training; None if nothing is.
        directions: those that were given, or that the resumed run had; None if they are to be extracted, or not needed.
    """

    config: ProConConfig
    conversations: Dataset
    evaluation: Dataset | None
    directions: Directions | None


def train(arguments: TrainArguments, config: ProConConfig) -> None:
    """``procon train``"""
    output = output_folder(config)
    if arguments.device_map is not None and config.world_size > 1:
        raise ProConError(
            f"device_map is {str(arguments.device_map)!r:.60}, and each of the {config.world_size} processes has a "
            "device of its own: leave it out"
        )
    if not arguments.resume and has_checkpoints(output):
        raise ProConError(f"output_dir {str(output)!r} holds checkpoints: pass --resume, or another --output_dir")
    check_name(arguments.model)
    # If the output folder is there already, the lock shows whether it can be written.
    for folder in filter(None, (None if output.is_dir() else output, config.procon_settings().anchors_dir)):
        check_writable(Path(folder) / "any")
    with locked(output):
        checkpoint = _checkpoint(output) if arguments.resume else None
        job = _plan(arguments, config, checkpoint)
        trainer, tokenizer = _trainer(arguments, job, output)
        trainer.add_callback(Preface(trainer, arguments.model))
        if arguments.early_stopping_patience:
            trainer.add_callback(
                EarlyStoppingCallback(arguments.early_stopping_patience, arguments.early_stopping_threshold)
            )
        if arguments.drift_steps:
            trainer.add_callback(DriftCallback(trainer, tokenizer, steps=arguments.drift_steps))
        with _resumable(output):
            trainer.train(resume_from_checkpoint=checkpoint)  # pyright: ignore[reportArgumentType]  # ours take it
        on_main(lambda: shutil.rmtree(output / MERGED, ignore_errors=True))
        trainer.save_model()
        trainer.save_state()
    if config.process_index == 0:
        name, console = printable(str(output)), Console()
        console.print(Text(_summary(trainer)))
        if best := getattr(trainer, "best", None):
            console.print(
                Text(f"Kept: the checkpoint of step {best['step']}, with the lowest loss, {best['value']:.4g}.")
            )
        console.print(Text(f"Written: {name}. Measure it: procon eval --model {name}"))
        if arguments.merge:
            merged = printable(str(write_merged(output, tokenizer, arguments)))
            console.print(Text(f"Merged: {merged}, a model without an adapter."))
    # Ranks leave together: one that is gone early takes the others' connections with it.
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()
    PartialState().destroy_process_group()


@contextmanager
def _resumable(output: Path) -> Iterator[None]:
    """Within the context, an interrupt says how to go on, if there is a checkpoint to go on from."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        if has_checkpoints(output):
            raise KeyboardInterrupt("the same command with --resume goes on from the last checkpoint") from interrupt
        raise


def _summary(trainer: Trainer) -> str:
    """What the constraint did, as measured."""
    if not isinstance(trainer, ProConTrainer) or not trainer.procon.active:
        return "Trained without the constraint."
    did, constraint = trainer.procon.did(trainer.state.global_step), trainer.procon.constraint
    blocks = (
        ""
        if constraint is None
        else (f", which acted on {len(did['blocks_acted'])} of its {len(constraint.blocks)} blocks")
    )
    return (
        f"{did['constrained_steps']} of {did['steps']} steps were under the constraint{blocks}; mean penalty "
        f"{did['mean_penalty']:.3g} before alpha."
    )


def _needs_directions(config: ProConConfig) -> bool:
    settings = config.procon_settings()
    return settings.anchors != "none" and AlphaSchedule.parse(settings.schedule).active


def _checkpoint(output: Path) -> Checkpoint:
    """The checkpoint to resume from."""
    found = on_main(lambda: latest(output))
    if not found:
        raise ProConError(f"no complete checkpoint in {str(output)!r} to resume from: leave --resume out")
    return found


def _plan(arguments: TrainArguments, config: ProConConfig, checkpoint: Checkpoint | None) -> _Job:
    if config.max_steps <= 0 and not config.num_train_epochs > 0:
        raise ProConError(f"num_train_epochs is {config.num_train_epochs:g}: give a number above 0, or max_steps")
    directed = _needs_directions(config)
    if not checkpoint:
        on_main(lambda: check_probe_file(config.procon_settings()))
    conversations, evaluation = _conversations(arguments, config.seed)
    if arguments.safety_samples or arguments.safety_data:
        safety = load_conversations(arguments.safety_data) if arguments.safety_data else safety_conversations()
        conversations = mix_safety(conversations, safety, arguments.safety_samples or len(safety), seed=config.seed)
    directions = None
    if directed and arguments.directions:
        directions = Directions.load(arguments.directions)
    elif directed and checkpoint:
        beside = (checkpoint.path / DIRECTIONS_FILE).is_file()
        directions = Directions.load(checkpoint.path if beside else output_folder(config))
    return _Job(config, conversations, evaluation, directions)


def _conversations(arguments: TrainArguments, seed: int) -> tuple[Dataset, Dataset | None]:
    """What is trained on, and what is evaluated on."""
    columns = parse_columns(arguments.data_columns)
    of_hub: dict[str, Any] = {"config": arguments.data_config, "revision": arguments.data_revision}
    data = load_conversations(arguments.data, split=arguments.data_split, columns=columns, **of_hub)
    if arguments.eval_share:
        if (rows := round(arguments.eval_share * len(data))) in (0, len(data)):
            raise ProConError(
                f"eval_share is {arguments.eval_share:g}, which is {rows} of the {len(data)} samples: give a share "
                "that leaves samples on both sides"
            )
        parts = data.train_test_split(test_size=rows, seed=seed)
        return parts["train"], parts["test"]
    split = {"split": arguments.eval_split} if arguments.eval_split else {}
    if arguments.eval_data:
        return data, load_conversations(arguments.eval_data, columns=columns, **split)
    return data, load_conversations(arguments.data, columns=columns, **of_hub, **split) if split else None


def _trainer(arguments: TrainArguments, job: _Job, output: Path) -> tuple[Trainer, PreTrainedTokenizerBase]:
    """The trainer, with a model, an adapter and directions, extracted now if there are none; and the tokenizer."""
    loading = arguments.loading()
    if arguments.method == "full" and arguments.dtype == "auto":
        loading["dtype"] = "float32"
    if job.config.use_cpu and loading["device_map"] is None:
        loading["device_map"] = "cpu"
    model, tokenizer = load_model(arguments.model, **loading)
    directions = job.directions
    if directions:
        directions.check_fits(find_decoder(model))
    chat = chat_settings(arguments)
    settings: dict[str, Any] = {"chat": chat, "max_length": arguments.max_length, "overlong": arguments.overlong}
    dataset = tokenize_conversations(job.conversations, tokenizer, **settings)
    set_seed(job.config.seed)
    # A new adapter changes nothing yet, and one that does not fit shows before the minutes of extraction.
    model = trainable(model, arguments)
    if _needs_directions(job.config) and directions is None:
        # Before there is a trainer, as that makes the output folder.
        with job.config.main_process_first(local=False, desc="refusal directions"):
            if job.config.process_index == 0:
                Directions.extract(model, tokenizer, chat=chat).save(output / DIRECTIONS_FILE)
            directions = Directions.load(output)
    trainer = ProConTrainer(
        model,
        job.config,
        directions=directions,
        chat=chat,
        train_dataset=dataset,
        eval_dataset=tokenize_conversations(job.evaluation, tokenizer, **settings) if job.evaluation else None,
        data_collator=_collator(arguments, model, tokenizer),
        processing_class=tokenizer,
    )
    return trainer, tokenizer


def _collator(
    arguments: TrainArguments, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Callable[[list[dict[str, Any]]], Any]:
    if arguments.flatten:
        return flattening_collator(bounds="flash" in (model.config._attn_implementation or ""))
    return padding_collator(tokenizer)
