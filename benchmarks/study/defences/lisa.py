"""Lisa: steps on alignment data between steps on the user's, each kept near where the other left off (Huang et al.
2024, "Lisa: Lazy Safety Alignment for Large Language Models against Harmful Fine-tuning Attack", arXiv 2405.18641,
section 4).

    w~_{k+1} = argmin_w  f(w) + rho/2 * ||w - w_k||^2        f: loss on alignment data, ``alignment_steps`` steps
    w_{k+1}  = argmin_w  h(w) + rho/2 * ||w - w~_{k+1}||^2   h: loss on the user's data, ``user_steps`` steps

The paper takes 100 and 900 steps and rho = 1. The default here has the same share in shorter rounds, as training may
last no more than a few hundred steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn

from benchmarks.study.defences.alignment import AlignmentTrainer
from procon.errors import ProConError
from procon.training.loss_scale import loss_scale


class LisaTrainer(AlignmentTrainer):
    """Alternates between alignment data and ``train_dataset``, beginning with the former.

    The training arguments count steps on ``train_dataset``, and so do its logs, checkpoints and learning rates: user
    data are seen as often as without this defence. Before every ``user_steps`` of them there are ``alignment_steps``
    more, with batches as large, at the learning rate of that moment. Logs ``alignment_loss``.

    Args:
        alignment_dataset: tokenised as ``train_dataset`` is: malicious prompts with refusals.
        alignment_steps, user_steps: optimiser steps of a round.
        rho: strength of the proximal term towards the trainable weights at the last switch.

    Raises:
        ProConError: for settings that cannot be, and on resuming: checkpoints lack the last switch too.
    """

    def __init__(
        self,
        *args: Any,
        alignment_dataset: Dataset,
        alignment_steps: int = 10,
        user_steps: int = 90,
        rho: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, alignment_dataset=alignment_dataset, **kwargs)
        if min(alignment_steps, user_steps) < 1:
            raise ProConError(
                f"alignment_steps and user_steps are {alignment_steps} and {user_steps}: give 1 or more for each"
            )
        if not 0 <= rho < math.inf:
            raise ProConError(f"rho is {rho:g}: give a finite number, 0 or more")
        self.alignment_steps, self.user_steps, self.rho = alignment_steps, user_steps, rho
        self._switch: dict[str, Tensor] = {}
        self._alignment_losses: list[Tensor] = []

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Tensor | int | None]:
        # Called once before each optimiser step, and before the user's batches are taken.
        if self.state.global_step % self.user_steps == 0:
            self._align()
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch)
        if not model.training or self.rho == 0:
            return found
        loss, outputs = found if isinstance(found, tuple) else (found, None)
        # Each micro-batch of each rank adds its part of the one term that an optimiser step has.
        parts = self.current_gradient_accumulation_steps * self.accelerator.num_processes
        loss = loss + self.proximal_term() * loss_scale(self, num_items_in_batch) / parts
        return (loss, outputs) if return_outputs else loss

    def proximal_term(self) -> Tensor:
        """``rho/2 * ||w - w'||^2`` over the trainable weights, w' being those at the last switch."""
        squares = [
            (parameter.float() - self._switch[name].float()).square().sum()
            for name, parameter in self.model.named_parameters()
            if name in self._switch
        ]
        return self.rho / 2 * torch.stack(squares).sum()

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self._alignment_losses and "loss" in logs:
            logs["alignment_loss"] = torch.stack(self._alignment_losses).mean().item()
            self._alignment_losses.clear()
        super().log(logs, *args, **kwargs)

    def _align(self) -> None:
        """The steps on alignment data of one round; the loop of the Trainer does not see them."""
        self._keep_switch()
        model, accumulated = self.model_wrapped, self.args.gradient_accumulation_steps
        for _ in range(self.alignment_steps):
            batches, tokens = super().get_batch_samples(self.alignment_batches, accumulated, self.args.device)
            self.current_gradient_accumulation_steps = len(batches)
            losses = []
            for number, batch in enumerate(batches, 1):
                self.accelerator.gradient_state._set_sync_gradients(number == len(batches))
                losses.append(self.training_step(model, batch, tokens))
            if self.args.max_grad_norm > 0:
                self.accelerator.clip_grad_norm_(model.parameters(), self.args.max_grad_norm)
            self.optimizer.step()
            model.zero_grad()
            self._alignment_losses.append(torch.stack(losses).sum())
        self._keep_switch()

    def _keep_switch(self) -> None:
        self._switch = {
            name: parameter.detach().clone()
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad
        }
