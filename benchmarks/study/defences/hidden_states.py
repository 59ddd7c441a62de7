"""All of the hidden state kept near the start: what ProCon's constraint is when it leaves no direction free.

    loss = CE + alpha * mean over tokens t and blocks l of  ||x_l[t] - x0_l[t]||^2 / D

x_l[t] is the input of block l at token t, x0_l[t] the same under the model as training started, D its width. This is
the upper ablation of the projection constraint (arXiv 2509.06795, section III-C1), which keeps <r_l, x_l[t]> alone; as
a defence it is feature distillation from the start.
"""

from __future__ import annotations

import inspect
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.study.defences.predictions import without_labels
from benchmarks.study.defences.trainer import TokenMeanTrainer, tokens_in_scope
from procon.constraint import select_among
from procon.errors import ProConError
from procon.models import StartingModel, find_decoder, first_moving_block, observe_block_inputs, transformers_model
from procon.settings import Blocks, TokenScope, check_alpha, check_setting


class HiddenStatesTrainer(TokenMeanTrainer):
    """Adds the distance of the block inputs to those of the start; evaluation reports CE.

    The reference is the model as the trainer is given it, run beside the model in every step.

    Args:
        alpha: strength.
        blocks: ``"all"``, a list of indices, or a fraction: the deepest share of them.
        scope: tokens whose hidden states are kept: ``"response"``, ``"prompt"`` or ``"all"``.

    Raises:
        ProConError: for settings that are none of these, and if nothing below a chosen block trains.
    """

    def __init__(
        self, *args: Any, alpha: float = 0.1, blocks: Blocks = "all", scope: TokenScope = "response", **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        check_alpha(alpha)
        check_setting("scope", scope)
        self.alpha, self.scope = alpha, scope
        self._decoder = find_decoder(self.model)
        self.blocks = select_among(torch.ones(len(self._decoder.blocks), dtype=torch.bool), blocks)
        self._moving = [block for block in self.blocks if block >= first_moving_block(self._decoder)]
        if not self._moving:
            raise ProConError(
                "nothing below a chosen block trains, so keeping its input does nothing: give deeper blocks"
            )
        self._start = StartingModel(self.model)
        # The reference needs its block inputs alone.
        few = "logits_to_keep" in inspect.signature(transformers_model(self.model).forward).parameters
        self._without_head = {"logits_to_keep": 1} if few else {}

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        if not model.training or self.alpha == 0:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch)
        mask = tokens_in_scope(inputs, self.scope)
        start: dict[int, Tensor] = {}
        with observe_block_inputs(self._decoder, lambda block, hidden: start.update({block: hidden[mask]})):
            self._start(**{**without_labels(inputs), **self._without_head})
        now: dict[int, Tensor] = {}
        with observe_block_inputs(self._decoder, lambda block, hidden: now.update({block: hidden})):
            found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch)
        if not all(now[block].requires_grad for block in self._moving):
            raise ProConError(
                "gradient checkpointing with use_reentrant=True hides the hidden states' gradients: set "
                "use_reentrant=False"
            )
        loss, outputs = found if isinstance(found, tuple) else (found, None)
        distances = ((now[block][mask].float() - start[block].float()).square().sum() for block in self._moving)
        distance = reduce(torch.add, distances)
        mean = self.token_mean(distance / (len(self.blocks) * self._decoder.hidden_size), num_items_in_batch)
        loss = loss + self.alpha * mean
        return (loss, outputs) if return_outputs else loss
