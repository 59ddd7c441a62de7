"""A step back to safety after each step on the user's data, if the loss on alignment data is above what is allowed
(SPARD, Chen et al. 2026, arXiv 2605.28030, without its selection of data; in the form of its authors' code).

    l > tau + tolerance:    g_p <- min((l - tau) / ||g_p||, 1) * g_p    and a second step of the user's own optimiser

l is the loss on a batch of refusals after the user's step, g its gradient, clipped to a length of 1; g_p is that of
parameter p. The optimiser's moments are those of both kinds of step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
        tolerance: by which it may be more before a step is taken.

    Raises:
        ProConError: under fp16, and on resuming.
    """

    def __init__(
        self, *args: Any, alignment_dataset: Dataset, tau: float = 0.2, tolerance: float = 0.1, **kwargs: Any
    ) -> None:
        super().__init__(*args, alignment_dataset=alignment_dataset, **kwargs)
        self.tau, self.tolerance = tau, tolerance
        self.add_callback(_AfterStep(self.step_back))

    def step_back(self) -> None:
        """Take one step back, if the loss on the next alignment batch is above what is allowed."""
        optimizer: Any = self.optimizer
        loss, gradient = self.alignment_gradient(_cross_entropy)
        if loss <= self.tau + self.tolerance:
            return
        clip = (1 / inner_product(gradient, gradient).sqrt()).clamp_max(1)
        optimizer.zero_grad()
        for parameter, direction in gradient.items():
            clipped = direction * clip.to(direction.dtype)
            parameter.grad = clipped * ((loss - self.tau) / clipped.norm().clamp_min(1e-30)).clamp_max(1).to(clipped)
        optimizer.step()


class _AfterStep(TrainerCallback):
    """Calls ``act`` once the optimiser has changed the weights, before the gradients are cleared."""

    def __init__(self, act: Callable[[], None]) -> None:
        self._act = act

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        self._act()


def _cross_entropy(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    return -response_log_probs(model(**without_labels(batch)).logits, batch)
