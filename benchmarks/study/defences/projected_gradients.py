"""SafeGrad: what in the user's gradient goes against alignment is taken out (Yi et al. 2025, "Gradient Surgery for Safe
LLM Fine-Tuning", arXiv 2508.07172).

    g = gradient of the user's loss        a = gradient of  mean KL(pi_start || pi_theta)  on refusals
    where <g, a> < 0:    g <- g - <g, a> / ||a||^2 * a
    step along           g + rho * a

Both are of one optimiser step, over all trainable parameters as one vector.
"""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn

from benchmarks.study.defences.trainer import (
    AlignmentTrainer,
    inner_product,
    kl_divergence,
    response_predictions,
    without_labels,
)
from procon.models import StartingModel


class ProjectedGradientsTrainer(AlignmentTrainer):
    """Projects the gradient of each optimiser step, before it is clipped; a batch of alignment data for each step.

    Args:
        alignment_dataset: tokenised as ``train_dataset`` is: malicious prompts with refusals.
        rho: weight of the alignment's own gradient.

    Raises:
        ProConError: under fp16, and on resuming.
    """

    def __init__(self, *args: Any, alignment_dataset: Dataset, rho: float = 1.0, **kwargs: Any) -> None:
        super().__init__(*args, alignment_dataset=alignment_dataset, **kwargs)
        self.rho = rho
        self._start = StartingModel(self.model)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:  # of the whole optimiser step, and of all ranks
            self._project()
        return loss

    @torch.no_grad()
    def _project(self) -> None:
        with torch.enable_grad():
            _, alignment = self.alignment_gradient(self._divergence)
        user = {parameter: parameter.grad for parameter in alignment if parameter.grad is not None}
        along = inner_product(user, alignment)
        squared = inner_product(alignment, alignment)
        # Nothing to take out where they agree, nor while the model is at its start.
        conflict = torch.where((along < 0) & (squared > 0), along / squared.clamp_min(1e-30), 0)
        for parameter, gradient in alignment.items():
            change = gradient * (self.rho - conflict).to(gradient.dtype)
            parameter.grad = change if parameter.grad is None else parameter.grad + change

    def _divergence(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        unlabelled = without_labels(batch)
        start = response_predictions(self._start(**unlabelled).logits, batch)
        return kl_divergence(start, response_predictions(model(**unlabelled).logits, batch))
