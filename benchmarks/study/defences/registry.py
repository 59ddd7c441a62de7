"""All defences by name, so that the study can run any of them on the same work."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel, Trainer

from benchmarks.study.defences.constrained_sft import ConstrainedSFTTrainer
from benchmarks.study.defences.frozen_layers import FrozenLayersTrainer
from benchmarks.study.defences.hidden_states import HiddenStatesTrainer
from benchmarks.study.defences.kl_to_start import KLToStartTrainer
from benchmarks.study.defences.lisa import LisaTrainer
from benchmarks.study.defences.moving_average import MovingAverageTrainer
from benchmarks.study.defences.null_space import NullSpaceTrainer
from benchmarks.study.defences.projected_gradients import ProjectedGradientsTrainer
from benchmarks.study.defences.safe_lora import SafeLoRATrainer
from benchmarks.study.defences.safe_merge import SafeMergeTrainer
from benchmarks.study.defences.safety_step import SafetyStepTrainer
from benchmarks.study.defences.steering import SteeringTrainer
from procon.directions import Directions
from procon.errors import ProConError
from procon.schedule import AlphaSchedule
from procon.training import ProConConfig, ProConTrainer


@dataclass(frozen=True)
class Defence:
    """A way of fine-tuning that is meant to keep refusals.

    Attributes:
        trainer: the class that trains.
        config: training arguments that it sets if they are left at their defaults.
        needs: what else its trainer takes: of ``"directions"``, ``"alignment_dataset"``, ``"base"``.
    """

    trainer: type[Trainer] = Trainer
    config: Mapping[str, Any] = field(default_factory=lambda: {"procon_schedule": "0"})
    needs: frozenset[str] = frozenset()

    def configure(self, args: ProConConfig) -> ProConConfig:
        """A copy of ``args`` with :attr:`config` in the fields that have the class's own default.

        Raises:
            ProConError: if ``procon_schedule`` contradicts the defence.
        """
        args, defaults = copy.copy(args), {f.name: f.default for f in fields(args)}
        for name, value in self.config.items():
            if getattr(args, name) == defaults[name]:
                setattr(args, name, value)
        constrains = issubclass(self.trainer, ProConTrainer)
        if AlphaSchedule.parse(args.procon_schedule).active != constrains:
            raise ProConError(
                f"{self.trainer.__name__} has {'a' if constrains else 'no'} projection constraint, but procon_schedule "
                f"is {args.procon_schedule!r}: leave it out"
            )
        return args


_DIRECTIONS, _ALIGNMENT, _BASE = (frozenset({name}) for name in ("directions", "alignment_dataset", "base"))


def _procon(schedule: str, **config: Any) -> Defence:
    settings = {f"procon_{name}": value for name, value in config.items()}
    return Defence(ProConTrainer, {"procon_schedule": schedule, **settings}, _DIRECTIONS)


#: All defences, by the name that run files carry. Safety samples are the methods' matter.
DEFENCES: dict[str, Defence] = {
    "plain": Defence(),
    "safe": Defence(),  # Bianchi et al. 2024, Safety-Tuned LLaMAs, arXiv 2309.07875: samples alone
    "sppft": Defence(FrozenLayersTrainer),
    "constrained_sft": Defence(ConstrainedSFTTrainer),
    "safe_lora": Defence(SafeLoRATrainer, needs=_BASE),
    "lisa": Defence(LisaTrainer, needs=_ALIGNMENT),
    "steering": Defence(SteeringTrainer, needs=_DIRECTIONS),
    "kl": Defence(KLToStartTrainer),
    "safegrad": Defence(ProjectedGradientsTrainer, needs=_ALIGNMENT),
    "safety_step": Defence(SafetyStepTrainer, needs=_ALIGNMENT),
    "null_space": Defence(NullSpaceTrainer, needs=_ALIGNMENT),
    "moving_average": Defence(MovingAverageTrainer),
    "safe_merge": Defence(SafeMergeTrainer, needs=_ALIGNMENT | _BASE),
    "hidden_states": Defence(HiddenStatesTrainer),
    # Safety Anchor, arXiv 2605.05995.
    "sbr": _procon("procon_s:1", anchors="none", probe_weight=10.0, probe_every=1),
    "procon_s": _procon("procon_s"),
    "procon_wu": _procon("procon_wu"),
    "procon_s_safe": _procon("procon_s"),
    # The paper halves the warm-up if safety samples are mixed in (section V-D).
    "procon_wu_safe": _procon("procon_wu:1@2ep"),
}


def build_trainer(
    name: str,
    model: nn.Module,
    args: ProConConfig,
    *,
    settings: Mapping[str, Any] | None = None,
    directions: Directions | None = None,
    alignment_dataset: Dataset | None = None,
    base: PreTrainedModel | str | Path | None = None,
    **trainer_arguments: Any,
) -> Trainer:
    """The trainer of defence ``name``, which takes of the rest what it needs and leaves what it does not.

    Args:
        args: its ``procon_`` settings are used by the ProCon defences; those left at their defaults take the defence's.
        settings: the defence's own, in place of their defaults.
        directions: refusal directions of the model as training starts.
        alignment_dataset: tokenised, malicious prompts with refusals.
        base: the model before alignment, or its folder or hub name.
        trainer_arguments: ``train_dataset``, ``data_collator`` and others, as for the Trainer.

    Raises:
        ProConError: if something that it needs is not given, and for a schedule that contradicts it.
    """
    defence = DEFENCES[name]
    args = defence.configure(args)
    given = {"directions": directions, "alignment_dataset": alignment_dataset, "base": base}
    for need in sorted(defence.needs):
        if given[need] is None:
            raise ProConError(f"defence {name!r} needs {need}: pass {need}")
    needed = {need: given[need] for need in defence.needs}
    trainer: Any = defence.trainer
    return trainer(model, args, **needed, **(settings or {}), **trainer_arguments)
