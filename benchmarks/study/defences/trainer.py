"""What the trainers of all defences share: what a model predicts of a reply, and gradients on alignment data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import Trainer
from transformers.trainer_utils import TrainOutput

from procon.errors import ProConError
from procon.sequences import IGNORE_INDEX
from procon.training.loss_scale import loss_scale

#: By parameter.
Gradients = dict[nn.Parameter, Tensor]


class DefenceTrainer(Trainer):
    """A Trainer whose model is there."""

    # The Trainer's are None without a model, and before it trains.
    model: nn.Module
    model_wrapped: nn.Module


class TokenMeanTrainer(DefenceTrainer):
    """A trainer with a loss that is a mean over response tokens of the whole optimiser step, as the Trainer's CE is."""

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Tensor | int | None]:
        batches, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        tokens = torch.zeros((), device=self.args.device)
        for batch in batches:
            tokens += response_tokens(batch).sum().to(tokens.device)
        if self.args.world_size > 1:
            tokens = self.accelerator.reduce(tokens)
        self._step_tokens = tokens.clamp_min(1)  # pyright: ignore[reportAttributeAccessIssue]  # a tensor gives one
        return batches, num_items_in_batch

    def token_mean(self, token_sum: Tensor, num_items_in_batch: object | None) -> Tensor:
        """This micro-batch's share of a mean over the optimiser step's tokens, as ``compute_loss`` has to return it."""
        return token_sum * loss_scale(self, num_items_in_batch) / self._step_tokens


class AlignmentTrainer(DefenceTrainer):
    """Draws batches of alignment data beside those of the user, and takes gradients of a loss on them.

    Args:
        alignment_dataset: tokenised as ``train_dataset`` is: malicious prompts with refusals.

    Raises:
        ProConError: under fp16, whose scaled gradients cannot be compared, and on resuming: checkpoints do not have the
            place in the alignment data.
    """

    def __init__(self, *args: Any, alignment_dataset: Dataset, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.accelerator.scaler is not None:
            raise ProConError(
                f"{type(self).__name__} compares gradients, and fp16 scales them: train in bfloat16 or float32"
            )
        self.alignment_dataset = alignment_dataset
        self._alignment_batches: Iterator[dict[str, Tensor]] = iter(())

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        if resume_from_checkpoint:
            raise ProConError(f"{type(self).__name__} cannot resume: start afresh")
        self._alignment_batches = self._draw_alignment_batches()
        return super().train(None, *args, **kwargs)

    def _draw_alignment_batches(self) -> Iterator[dict[str, Tensor]]:
        """Without end, made as those of the user are."""
        users, self.train_dataset = self.train_dataset, self.alignment_dataset
        try:
            loader = self.get_train_dataloader()
        finally:
            self.train_dataset = users
        while True:
            yield from loader

    def alignment_gradient(self, losses: Callable[[nn.Module, dict[str, Any]], Tensor]) -> tuple[Tensor, Gradients]:
        """Mean loss over the response tokens of the next alignment batch, of all ranks, and its gradient.

        The gradients that parameters have stay as they are.

        Args:
            losses: from the model and the batch, the loss of each response token, ``[N]``.
        """
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        kept = [parameter.grad for parameter in trained]
        for parameter in trained:
            parameter.grad = None
        batch = cast(dict[str, Any], self._prepare_inputs(next(self._alignment_batches)))
        tokens = response_tokens(batch).sum().clamp_min(1).float()
        tokens = cast(Tensor, self.accelerator.reduce(tokens, "mean"))
        with self.compute_loss_context_manager():
            loss = losses(self.model_wrapped, batch).sum() / tokens
        loss.backward()  # averaged over the ranks, as the tokens are
        found = {parameter: parameter.grad for parameter in trained if parameter.grad is not None}
        for parameter, gradient in zip(trained, kept, strict=True):
            parameter.grad = gradient
        return cast(Tensor, self.accelerator.reduce(loss.detach(), "mean")), found


def inner_product(ours: Gradients, theirs: Gradients) -> Tensor:
    """Scalar fp32, over the parameters that both have."""
    return torch.stack([(ours[p].float() * theirs[p].float()).sum() for p in ours if p in theirs]).sum()


def response_tokens(batch: dict[str, Tensor]) -> Tensor:
    """``[B, T]`` bool: those with a label, but for a row's first, which nothing predicts."""
    response = batch["labels"] != IGNORE_INDEX
    response[:, 0] = False
    return response


def without_labels(batch: dict[str, Any]) -> dict[str, Any]:
    """What a model takes for its predictions alone: with labels it would make a loss of its own."""
    return {name: value for name, value in batch.items() if name not in ("labels", "shift_labels")}


def response_log_probs(logits: Tensor, batch: dict[str, Any]) -> Tensor:
    """``[N]`` fp32: log-probabilities of the response tokens of ``batch``, from what the model makes of it."""
    return -cross_entropy(*_of_response(logits, batch), reduction="none")


def response_predictions(logits: Tensor, batch: dict[str, Any]) -> Tensor:
    """``[N, V]`` fp32: log-probabilities of all tokens in the place of each response token."""
    return _of_response(logits, batch)[0].log_softmax(-1)


def _of_response(logits: Tensor, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """``[N, V]`` fp32 logits in the place of each response token, and ``[N]`` these tokens.

    The logits are ``[B, T, V]``, of each token in ``labels``; or, if the batch chose some by ``logits_to_keep``, of
    those whose next tokens are in ``shift_labels``.
    """
    targets = batch.get("shift_labels")
    if targets is None:
        logits, targets = logits[:, :-1], batch["labels"][:, 1:]
    response = targets != IGNORE_INDEX
    return logits[response].float(), targets[response]


def kl_divergence(ours: Tensor, theirs: Tensor) -> Tensor:
    """``[N]``: ``KL(ours || theirs)`` of each token, from log-probabilities ``[N, V]``, in nats."""
    return (ours.exp() * (ours - theirs)).sum(-1)
