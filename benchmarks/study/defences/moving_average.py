"""A moving average of the weights, in the place of the last ones (Kim et al. 2025, "Rethinking Safety in LLM
Fine-tuning: An Optimization Perspective", arXiv 2508.12531).

    a_0 = w_0        a_t = decay * a_{t-1} + (1 - decay) * w_t        w_T <- a_T

The average lags some 1 / (1 - decay) steps behind, so it lies nearer to the start. The paper recommends it beside a low
learning rate.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.trainer_utils import TrainOutput

from benchmarks.study.defences.trainer import AfterStep, DefenceTrainer
from procon.errors import ProConError


class MovingAverageTrainer(DefenceTrainer):
    """Trains, and puts the average of the trainable weights in their place at the end of :meth:`train`.

    Checkpoints hold the weights that are trained on, not their average.

    Args:
        decay: of the average at each optimiser step, from 0, which is plain training, to below 1.

    Raises:
        ProConError: for a decay that is no such number; and on resuming: checkpoints lack the average.
    """

    def __init__(self, *args: Any, decay: float = 0.9, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not 0 <= decay < 1:
            raise ProConError(f"decay is {decay:g}: give a number from 0 to below 1")
        self.decay = decay
        self._average: dict[nn.Parameter, Tensor] = {}
        self.add_callback(AfterStep(self.follow))

    @torch.no_grad()
    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        if resume_from_checkpoint:
            raise ProConError("MovingAverageTrainer cannot resume, as checkpoints lack the average: start afresh")
        self._average = {
            parameter: parameter.detach().float().clone()
            for parameter in self.model.parameters()
            if parameter.requires_grad
        }
        with torch.enable_grad():
            output = super().train(None, *args, **kwargs)
        for parameter, average in self._average.items():
            parameter.copy_(average)
        return output

    @torch.no_grad()
    def follow(self) -> None:
        """Take the weights as they are into the average."""
        for parameter, average in self._average.items():
            average.lerp_(parameter.float(), 1 - self.decay)
