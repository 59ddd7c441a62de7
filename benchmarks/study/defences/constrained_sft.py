"""Constrained SFT: the first response tokens stay close to the aligned model's (Qi et al. 2024, "Safety Alignment
Should Be Made More Than Just a Few Tokens Deep", arXiv 2406.05946, section 4.1).

    loss = mean over response tokens of  -2 / beta_t * log sigmoid(beta_t * log(pi_theta(y_t) / pi_start(y_t)))

Its gradient is that of CE, weighted by 2 * (1 - sigmoid(beta_t * log ratio)): 1 where training starts, and falling the
faster the larger beta_t is as a token becomes more likely than it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from benchmarks.study.defences.predictions import response_log_probs, without_labels
from benchmarks.study.defences.trainer import TokenMeanTrainer
from procon.errors import ProConError
from procon.models import StartingModel
from procon.sequences import IGNORE_INDEX

#: The paper's recommendation: weak at the first token, strong at the next four, nearly CE after them.
BETAS = (0.5, 2.0, 2.0, 2.0, 2.0, 0.1)


class ConstrainedSFTTrainer(TokenMeanTrainer):
    """Trains on the token-wise constrained loss; evaluation reports CE.

    The reference is the model as the trainer is given it, run beside the model in every step.

    Args:
        betas: of the first response tokens, one each; the last one is that of all further tokens. Tokens are counted
            within each assistant turn.

    Raises:
        ProConError: for betas that are not positive, and for another loss in the arguments.
    """

    def __init__(self, *args: Any, betas: Sequence[float] = BETAS, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not betas or min(betas) <= 0:
            raise ProConError(f"betas are {list(betas)}: give one or more positive numbers")
        if self.label_smoother is not None or self.compute_loss_func is not None:
            raise ProConError(
                "ConstrainedSFTTrainer has a loss of its own: leave label_smoothing_factor and compute_loss_func out"
            )
        self._betas = torch.tensor(betas, device=self.args.device)
        self._start = StartingModel(self.model)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch)
        unlabelled = without_labels(inputs)
        # First, so that its logits are gone before the training forward makes its own.
        start = response_log_probs(self._start(**unlabelled).logits, inputs)
        outputs = model(**unlabelled)
        log_ratio = response_log_probs(outputs.logits, inputs) - start
        beta = self._betas[response_positions(inputs["labels"]).clamp_max(len(self._betas) - 1)]
        loss = self.token_mean(constrained_loss(log_ratio, beta).sum(), num_items_in_batch)
        return (loss, outputs) if return_outputs else loss


def constrained_loss(log_ratio: Tensor, beta: Tensor) -> Tensor:
    """The loss of each token, from its ``log pi_theta - log pi_start`` and its beta; all of one shape, fp32."""
    return -2 / beta * logsigmoid(beta * log_ratio)


def response_positions(labels: Tensor) -> Tensor:
    """``[N]`` int64: place of each response token in its run of labelled tokens, from 0."""
    response = labels[:, 1:] != IGNORE_INDEX
    counted = response.cumsum(-1)
    before = torch.where(response, 0, counted).cummax(-1).values
    return (counted - before - 1)[response]
