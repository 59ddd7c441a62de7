"""What a model predicts of the response tokens in a batch."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import cross_entropy

from procon.sequences import IGNORE_INDEX


def without_labels(batch: dict[str, Any]) -> dict[str, Any]:
    """What a model takes for its predictions alone: with labels it would make a loss of its own."""
    return {name: value for name, value in batch.items() if name != "labels"}


def response_log_probs(logits: Tensor, labels: Tensor) -> Tensor:
    """``[N]`` fp32: log-probabilities of the response tokens in ``labels [B, T]``, from ``logits [B, T, V]``."""
    targets = labels[:, 1:]
    response = targets != IGNORE_INDEX
    return -cross_entropy(logits[:, :-1][response].float(), targets[response], reduction="none")


def response_predictions(logits: Tensor, labels: Tensor) -> Tensor:
    """``[N, V]`` fp32: log-probabilities of all tokens in the place of each response token."""
    return logits[:, :-1][labels[:, 1:] != IGNORE_INDEX].float().log_softmax(-1)


def kl_divergence(ours: Tensor, theirs: Tensor) -> Tensor:
    """``[N]``: ``KL(ours || theirs)`` of each token, from log-probabilities ``[N, V]``, in nats."""
    return (ours.exp() * (ours - theirs)).sum(-1)
