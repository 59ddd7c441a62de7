"""What the trainers of all defences share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from procon.errors import ProConError
from procon.sequences import IGNORE_INDEX, TokenScope
from procon.training.loss_scale import loss_scale


class DefenceTrainer(Trainer):
    """A Trainer on one device, or on several under DDP; what would lose the defence is refused.

    Args:
        model, args, train_dataset, ...: as for the Trainer.

    Raises:
        ProConError: for ``model_init``, a sharded model, ``nn.DataParallel`` and ``torch_compile``.
    """

    # The Trainer's are None without a model, and before it trains.
    model: nn.Module
    model_wrapped: nn.Module
    optimizer: torch.optim.Optimizer

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        unsupported = {
            "model_init": self.model_init is not None,
            "nn.DataParallel": self.args.n_gpu > 1,
            "FSDP": self.is_fsdp_enabled,
            "DeepSpeed": self.is_deepspeed_enabled,
            "tensor, context or sequence parallelism": self.get_tp_size() * self.get_cp_size() * self.get_sp_size() > 1,
            "torch_compile": self.args.torch_compile,
        }
        for name, used in unsupported.items():
            if used:
                raise ProConError(
                    f"{type(self).__name__} does not support {name}: train on one device, or on several under DDP"
                )


class AfterStep(TrainerCallback):
    """Calls ``act`` once the optimiser has changed the weights, before the gradients are cleared."""

    def __init__(self, act: Callable[[], None]) -> None:
        self._act = act

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        self._act()


class TokenMeanTrainer(DefenceTrainer):
    """A trainer with a loss that is a mean over tokens of the whole optimiser step, as the Trainer's CE is."""

    #: Which tokens the mean is over.
    scope: TokenScope = "response"

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Tensor | int | None]:
        batches, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        tokens = torch.zeros((), device=self.args.device)
        for batch in batches:
            tokens += tokens_in_scope(batch, self.scope).sum().to(tokens.device)
        if self.args.world_size > 1:
            tokens = self.accelerator.reduce(tokens)
        self._step_tokens = tokens.clamp_min(1)  # pyright: ignore[reportAttributeAccessIssue]  # a tensor gives one
        return batches, num_items_in_batch

    def token_mean(self, token_sum: Tensor, num_items_in_batch: object | None) -> Tensor:
        """This micro-batch's share of a mean over the optimiser step's tokens, as ``compute_loss`` has to return it."""
        return token_sum * loss_scale(self, num_items_in_batch) / self._step_tokens


def tokens_in_scope(batch: dict[str, Tensor], scope: TokenScope) -> Tensor:
    """``[B, T]`` bool: response tokens are those with a label, but for a row's first, which nothing predicts."""
    if "labels" not in batch:
        raise ProConError("the batch has no labels: a defence needs them to separate the response from the prompt")
    response = batch["labels"] != IGNORE_INDEX
    response[:, 0] = False
    if scope == "response":
        return response
    real = batch["attention_mask"].bool() if "attention_mask" in batch else torch.ones_like(response)
    return real & ~response if scope == "prompt" else real
