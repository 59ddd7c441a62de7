"""A step back to safety after each step on the user's data: the shortest one that brings the loss on alignment data to
what is allowed, by its linearisation (the safety projection of SPARD, Chen et al. 2026, arXiv 2605.28030, without its
selection of data).

    d = -max(l - tau, 0) / ||a||^2 * a,    no longer than ``radius``

l is the loss on a batch of refusals after the user's step, a its gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import TrainerCallback

from benchmarks.study.defences.trainer import (
    AlignmentTrainer,
    inner_product,
    response_log_probs,
    without_labels,
)


class SafetyStepTrainer(AlignmentTrainer):
    """Corrects the weights after each optimiser step; a batch of alignment data for each.

    Args:
        alignment_dataset: tokenised as ``train_dataset`` is: malicious prompts with refusals.
        tau: cross-entropy on alignment data that is allowed, in nats per response token.
        radius: of the trust region: the greatest length of a step back, over all trainable parameters.

    Raises:
        ProConError: under fp16, and on resuming.
    """

    def __init__(
        self, *args: Any, alignment_dataset: Dataset, tau: float = 0.2, radius: float = 0.1, **kwargs: Any
    ) -> None:
        super().__init__(*args, alignment_dataset=alignment_dataset, **kwargs)
        self.tau, self.radius = tau, radius
        self.add_callback(_AfterStep(self.step_back))

    @torch.no_grad()
    def step_back(self) -> None:
        """Take one step back, if the loss on the next alignment batch is above ``tau``."""
        with torch.enable_grad():
            loss, gradient = self.alignment_gradient(_cross_entropy)
        norm = inner_product(gradient, gradient).sqrt().clamp_min(1e-30)
        length = ((loss.float() - self.tau).clamp_min(0) / norm).clamp_max(self.radius)
        for parameter, direction in gradient.items():
            parameter -= (length / norm * direction).to(parameter.dtype)


class _AfterStep(TrainerCallback):
    """Calls ``act`` once the optimiser has changed the weights, before the gradients are cleared."""

    def __init__(self, act: Callable[[], None]) -> None:
        self._act = act

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        self._act()


def _cross_entropy(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    return -response_log_probs(model(**without_labels(batch)).logits, batch)
