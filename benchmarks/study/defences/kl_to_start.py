"""KL divergence to the start: the distribution over each response token stays near that of the model before training
(as in Kaczer et al. 2026, "In-Training Defenses against Emergent Misalignment in Language Models", arXiv 2508.06249).

    loss = CE + beta * mean over response tokens of  KL(pi_theta(. | y_<t) || pi_start(. | y_<t))

The paper takes beta = 0.1.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from benchmarks.study.defences.trainer import (
    TokenMeanTrainer,
    kl_divergence,
    response_predictions,
    without_labels,
)
from procon.models import StartingModel


class KLToStartTrainer(TokenMeanTrainer):
    """Adds the divergence from the start's predictions of the response; evaluation reports CE.

    The reference is the model as the trainer is given it, run beside the model in every step.

    Args:
        beta: strength.
    """

    def __init__(self, *args: Any, beta: float = 0.1, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.beta = beta
        self._start = StartingModel(self.model)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        if not model.training or self.beta == 0:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch)
        # First, so that its logits are gone before the training forward makes its own.
        start = response_predictions(self._start(**without_labels(inputs)).logits, inputs)
        # A copy, as label smoothing and a loss of the user's take the labels out.
        found: Any = super().compute_loss(model, dict(inputs), True, num_items_in_batch=num_items_in_batch)
        loss, outputs = found
        divergence = kl_divergence(response_predictions(outputs.logits, inputs), start)
        loss = loss + self.beta * self.token_mean(divergence.sum(), num_items_in_batch)
        return (loss, outputs) if return_outputs else loss
