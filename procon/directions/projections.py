"""Projections of prompts on directions, and how well they separate two sets of prompts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from procon.directions.block_directions import BlockDirections
from procon.directions.contrast_means import each_last_token
from procon.models import model_device
from procon.settings import ChatSettings


def project_last_token(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    directions: BlockDirections,
    prompts: Sequence[str],
    *,
    chat: ChatSettings | None = None,
    batch_size: int = 32,
    progress: bool = True,
) -> Tensor:
    """Projection of each prompt's last token on the first direction of each row: ``[len(prompts), L]`` fp32."""
    first = directions.basis[:, :1]
    return project_on_all(model, tokenizer, first, prompts, chat=chat, batch_size=batch_size, progress=progress)[..., 0]


def project_on_all(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    basis: Tensor,
    prompts: Sequence[str],
    *,
    chat: ChatSettings | None = None,
    batch_size: int = 32,
    progress: bool = True,
) -> Tensor:
    """Projection of each prompt's last token on all directions of ``basis [L, K, D]``: ``[len(prompts), L, K]`` fp32.

    Rows are the inputs of the blocks; one row more is that of the last block's output.
    """
    z = torch.empty(len(prompts), *basis.shape[:2])
    unit = basis.to(model_device(model))

    def consume(rows: list[int], site: int, hidden: Tensor) -> None:
        if site < len(unit):
            z[rows, site] = (hidden.float() @ unit[site].to(hidden.device).mT).cpu()

    each_last_token(model, tokenizer, prompts, consume, batch_size, "projections", progress, chat)
    return z


def auroc(positive: Tensor, negative: Tensor) -> Tensor:
    """Probability that a positive value exceeds a negative one, ties counting half: ``[n, ...], [m, ...] -> [...]``.

    The area under the receiver operating characteristic, exactly, as a share of all pairs, in fp32.
    """
    difference = positive[:, None] - negative[None]
    return ((difference > 0).float() + 0.5 * (difference == 0).float()).mean((0, 1))
