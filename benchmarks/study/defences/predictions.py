"""What a model predicts of the response tokens in a batch."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import cross_entropy

from procon.sequences import IGNORE_INDEX


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
