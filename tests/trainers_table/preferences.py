"""Training by preferences and rewards: one optimiser step of TRL's trainers in a given mode.

Each function returns the gradients of the trainer's loss + ``alpha`` * constraint, or of the loss alone where ``alpha``
is 0.
"""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import setting
import torch
from datasets import Dataset
from definition import Sequence
from rows import LONG, WORLD, FirstStep, Found, arguments, constraint_settings, losses_and_weights
from setting import Mode
from torch import Tensor
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

from procon.training.preferences import (
    KTOConfig,
    KTOTrainer,
    ProConDPOConfig,
    ProConDPOTrainer,
    ProConGRPOConfig,
    ProConGRPOTrainer,
    ProConKTOConfig,
    ProConKTOTrainer,
)


class NoSuchModeError(Exception):
    """TRL's trainer does not train in that way, so that nobody can ask for it."""


#: TRL's trainer and its configuration, and ours.
CLASSES = {
    "DPO": (DPOTrainer, DPOConfig, ProConDPOTrainer, ProConDPOConfig),
    "KTO": (KTOTrainer, KTOConfig, ProConKTOTrainer, ProConKTOConfig),
    "GRPO": (GRPOTrainer, GRPOConfig, ProConGRPOTrainer, ProConGRPOConfig),
}

#: Where anchors come from in columns that do not say so: those of all tokens, as in the rows of supervised data.
ANCHORS = "live"

#: Completions of a prompt in GRPO.
GENERATIONS = 2

#: Rows of the dataset, or completions that are generated of them, in an optimiser step.
ROWS_OF_A_STEP = {"DPO": 4, "KTO": 8, "GRPO": 8}


def data(kind: str) -> Dataset:
    pairs = setting.pairs()
    if kind == "DPO":
        rows = [{name: setting.text(ids) for name, ids in pair.items()} for pair in pairs]
    elif kind == "KTO":
        rows = [
            {"prompt": setting.text(pair["prompt"]), "completion": setting.text(pair[name]), "label": name == "chosen"}
            for pair in pairs
            for name in ("chosen", "rejected")
        ]
    else:
        rows = [{"prompt": setting.text(pair["prompt"])} for pair in pairs]
    return Dataset.from_list(rows)


def trained_on(kind: str) -> list[list[Sequence]]:
    """What an optimiser step takes of the dataset, all of it together; TRL ends a completion with ``<end>``."""
    sequences = []
    for pair in setting.pairs():
        for name in ("chosen", "rejected"):
            completion = [*pair[name], 1]
            ids = pair["prompt"] + completion
            sequences.append((ids, [False] * len(pair["prompt"]) + [True] * len(completion)))
    return [sequences]


def reward(completion_ids: list[list[int]], **_kwargs: Any) -> list[float]:
    """One that differs between completions."""
    return [float(sum(ids) % 7) for ids in completion_ids]


def own_settings(kind: str, mode: Mode) -> dict[str, Any]:
    """Arguments that only this trainer has."""
    if kind != "GRPO":
        return {"padding_free": True} if mode.batches == "padding-free" else {}
    # With a reference model, where it is the model without its adapter; full fine-tuning would load one from the hub.
    return {
        "num_generations": GENERATIONS,
        "max_completion_length": 6,
        "beta": 0.0 if mode.parameters == "full" else 0.04,
        "shuffle_dataset": False,
    }


def check_mode(kind: str, mode: Mode) -> None:
    """Raise NoSuchModeError if there is no setting that asks for the mode."""
    setting_of = {"packed": "packing", "padding-free": "padding_free"}.get(mode.batches)
    if setting_of and not hasattr(CLASSES[kind][1], setting_of):
        raise NoSuchModeError(f"TRL's {kind}Trainer has no {setting_of}")


def make(kind: str, mode: Mode, folder: Path, *, constrained: bool, **settings: Any):
    plain, plain_config, ours, our_config = CLASSES[kind]
    model = setting.model(mode.parameters, folder)
    more: dict[str, Any] = {"reward_funcs": reward} if kind == "GRPO" else {}
    if kind != "GRPO" and mode.parameters == "full":
        more["ref_model"] = copy.deepcopy(model)
    callbacks = settings.pop("callbacks", [])
    if constrained:
        more["directions"] = setting.directions()
    common = {**arguments(mode, folder, ROWS_OF_A_STEP[kind]), **own_settings(kind, mode)}
    return (ours if constrained else plain)(
        model,
        args=(our_config if constrained else plain_config)(**{**common, **settings}),
        train_dataset=data(kind),
        processing_class=setting.tokenizer(),
        callbacks=callbacks,
        **more,
    )


def step_of(kind: str, mode: Mode, folder: Path, alpha: float) -> Found:
    check_mode(kind, mode)
    step = FirstStep(mode)
    settings = constraint_settings(mode, folder, alpha, ANCHORS)
    run = make(kind, mode, folder, constrained=True, callbacks=[step], **settings)
    if mode.batches == "padding-free" and not run.padding_free:
        raise NoSuchModeError(f"TRL's {kind}Trainer pads all the same, and warns")
    if kind == "GRPO":
        batches = watched(run)
        run.train()
        return Found(step.gradients, of_all_ranks(batches))
    run.train()
    return Found(step.gradients, trained_on(kind))


def watched(run: GRPOTrainer) -> list[list[Sequence]]:
    """The micro-batches that ``run`` will train on, once it has; all but padding."""
    batches, prepare = [], run._prepare_inputs

    def prepare_inputs(inputs):
        prepared = prepare(inputs)
        batches.append(
            [
                (ids[kept].tolist(), constrained[kept].tolist())
                for ids, kept, constrained in zip(*sequences(prepared), strict=True)
            ]
        )
        return prepared

    run._prepare_inputs = prepare_inputs
    return batches


def sequences(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, which of them are no padding, and which are constrained: the response."""
    ids, kept = (torch.cat([batch[f"prompt_{part}"], batch[f"completion_{part}"]], 1) for part in ("ids", "mask"))
    constrained = torch.cat([torch.zeros_like(batch["prompt_mask"]), batch["completion_mask"]], 1)
    return ids, kept.bool(), constrained.bool()


def of_all_ranks(batches: list[list[Sequence]]) -> list[list[Sequence]]:
    if WORLD == 1:
        return batches
    gathered: list[Any] = [None] * WORLD
    torch.distributed.all_gather_object(gathered, batches)
    return [batch for rank in gathered for batch in rank]


def final_weights(kind: str, constrained: bool, mode: Mode, folder: Path) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and weights after 20 steps."""
    settings = {**LONG, "procon_anchors": ANCHORS, "procon_schedule": "0"} if constrained else LONG
    return losses_and_weights(make(kind, mode, folder, constrained=constrained, **settings))


ROWS = {kind: functools.partial(step_of, kind) for kind in CLASSES}

EXTENDED = {
    kind: tuple(functools.partial(final_weights, kind, constrained) for constrained in (False, True))
    for kind in CLASSES
}
