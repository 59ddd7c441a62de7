"""All defences by name, so that the study can run any of them on the same work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from torch import nn
from transformers import Trainer

from benchmarks.study.defences.kl_to_start import KLToStartTrainer
from benchmarks.study.defences.projected_gradients import ProjectedGradientsTrainer
from benchmarks.study.defences.safety_step import SafetyStepTrainer
from procon.directions import Directions
from procon.training import ProConConfig, ProConTrainer


@dataclass(frozen=True)
class Defence:
    """A way of fine-tuning that is meant to keep refusals.

    Attributes:
        trainer: the class that trains.
        needs: what else it takes: ``"directions"`` or ``"alignment_dataset"``; empty if nothing.
    """

    trainer: type[Trainer] = Trainer
    needs: str = ""


#: By the name that runs carry. Safety samples are the methods' matter.
DEFENCES: dict[str, Defence] = {
    "plain": Defence(),
    "safe": Defence(),  # Bianchi et al. 2024, Safety-Tuned LLaMAs, arXiv 2309.07875: samples alone
    "kl": Defence(KLToStartTrainer),
    "safegrad": Defence(ProjectedGradientsTrainer, "alignment_dataset"),
    "spard": Defence(SafetyStepTrainer, "alignment_dataset"),
    # SBR too, Safety Anchor, arXiv 2605.05995: probes alone.
    "procon_s": Defence(ProConTrainer, "directions"),
}


def build_trainer(
    name: str,
    model: nn.Module,
    args: ProConConfig,
    *,
    settings: Mapping[str, Any] | None = None,
    directions: Directions | None = None,
    alignment_dataset: Dataset | None = None,
    **trainer_arguments: Any,
) -> Trainer:
    """The trainer of defence ``name``, which takes of the rest what it needs and leaves what it does not.

    Args:
        args: its ``procon_`` settings are used by ProCon alone.
        settings: the defence's own, in place of their defaults.
        directions: refusal directions of the model as training starts.
        alignment_dataset: tokenised, malicious prompts with refusals.
        trainer_arguments: ``train_dataset``, ``data_collator`` and others, as for the Trainer.
    """
    defence = DEFENCES[name]
    given = {"directions": directions, "alignment_dataset": alignment_dataset}
    needed = {defence.needs: given[defence.needs]} if defence.needs else {}
    trainer: Any = defence.trainer
    return trainer(model, args, **needed, **(settings or {}), **trainer_arguments)
