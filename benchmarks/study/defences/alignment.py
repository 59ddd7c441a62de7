"""What the trainers share that look at alignment data, malicious prompts with refusals, while they train."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers.trainer_utils import TrainOutput

from benchmarks.study.defences.trainer import DefenceTrainer, tokens_in_scope
from procon.errors import ProConError

#: By parameter.
Gradients = dict[nn.Parameter, Tensor]


class AlignmentTrainer(DefenceTrainer):
    """Draws batches of alignment data beside those of the user.

    Args:
        alignment_dataset: tokenised as ``train_dataset`` is: malicious prompts with refusals.

    Raises:
        ProConError: on resuming: checkpoints do not have the place in the alignment data.
    """

    def __init__(self, *args: Any, alignment_dataset: Dataset, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.alignment_dataset = alignment_dataset
        self._alignment_batches: Iterator[dict[str, Tensor]] | None = None

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        if resume_from_checkpoint:
            raise ProConError(
                f"{type(self).__name__} cannot resume, as checkpoints lack where it is in the alignment data: start "
                "afresh"
            )
        self._alignment_batches = None
        return super().train(None, *args, **kwargs)

    @property
    def alignment_batches(self) -> Iterator[dict[str, Tensor]]:
        """Batches of alignment data without end, made as those of the user are."""
        if self._alignment_batches is None:
            self._alignment_batches = self._draw_alignment_batches()
        return self._alignment_batches

    def _draw_alignment_batches(self) -> Iterator[dict[str, Tensor]]:
        users, self.train_dataset = self.train_dataset, self.alignment_dataset
        try:
            loader = self.get_train_dataloader()
        finally:
            self.train_dataset = users
        if len(loader) == 0:
            raise ProConError("alignment_dataset makes no batch: give more samples, or drop dataloader_drop_last")
        while True:
            yield from loader


class AlignmentGradientTrainer(AlignmentTrainer):
    """Takes gradients of a loss on alignment data, beside those that training is about.

    Raises:
        ProConError: under fp16, whose scaled gradients cannot be compared.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.accelerator.scaler is not None:
            raise ProConError(
                f"{type(self).__name__} compares gradients, and fp16 scales them: train in bfloat16 or float32"
            )

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
        batch = cast(dict[str, Any], self._prepare_inputs(next(self.alignment_batches)))
        tokens = tokens_in_scope(batch, "response").sum().clamp_min(1).float()
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
