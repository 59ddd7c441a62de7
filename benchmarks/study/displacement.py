"""Where hidden states have gone: along the refusal direction, off it, and among which other directions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from procon.directions import Directions, each_last_token
from procon.models import find_decoder

#: Leading principal directions, and dimensions of largest magnitude, whose share is reported.
PRINCIPAL, MASSIVE = 8, 4


def last_token_states(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], *, batch_size: int = 32
) -> Tensor:
    """Block inputs at each prompt's last token: ``[len(prompts), L, D]`` fp32, on the CPU."""
    decoder = find_decoder(model)
    states = torch.empty(len(prompts), len(decoder.blocks), decoder.hidden_size)

    def consume(rows: list[int], block: int, hidden: Tensor) -> None:
        states[rows, block] = hidden.float().cpu()

    each_last_token(model, tokenizer, prompts, consume, batch_size, "hidden states", False)
    return states


@dataclass(frozen=True)
class Displacement:
    """Change of the hidden states of the same prompts, block by block; NaN if a block has no direction.

    Of a displacement ``d`` of one prompt's last token, ``<d, r>`` lies along the direction and the rest off it. A model
    that keeps ``<d, r>`` small and goes far off the direction may be routing around the constraint.

    Attributes:
        along: ``[L]``, mean ``|<d, r>|``, in units of the gap.
        off: ``[L]``, mean ``||d - <d, r> r||``, in units of the gap.
        direction_share: ``[L]``, share of the squared displacement that lies along ``r``. A random direction's is 1/D.
        principal_share: ``[L]``, share within the first 8 principal directions of the states at the start.
        massive_share: ``[L]``, share within the 4 dimensions whose states at the start are largest.
    """

    along: Tensor
    off: Tensor
    direction_share: Tensor
    principal_share: Tensor
    massive_share: Tensor


def measure_displacement(before: Tensor, after: Tensor, directions: Directions) -> Displacement:
    """Displacement between two results of :func:`last_token_states` for the same prompts, ``[n, L, D]`` each."""
    change = (after - before).double()
    unit = directions.basis[:, 0].double()
    gap = directions.gaps[:, 0].double()
    along = torch.where(directions.usable, (change * unit).sum(-1), torch.nan)  # [n, L]
    off = (change - along[..., None] * unit).norm(dim=-1)
    total = change.square().sum((0, 2))  # [L]
    total = torch.where(total > 0, total, torch.nan)
    principal = _principal_directions(before.double())  # [L, K, D]
    within = torch.einsum("nld,lkd->nlk", change, principal).square().sum((0, 2))
    largest = before.double().abs().mean(0).topk(min(MASSIVE, before.shape[-1]), dim=-1).indices  # [L, 4]
    massive = change.square().sum(0).gather(-1, largest).sum(-1)
    return Displacement(
        along=(along.abs().mean(0) / gap).float(),
        off=(off.mean(0) / gap).float(),
        direction_share=(along.square().sum(0) / total).float(),
        principal_share=(within / total).float(),
        massive_share=(massive / total).float(),
    )


def _principal_directions(states: Tensor) -> Tensor:
    centred = (states - states.mean(0)).transpose(0, 1)  # [L, n, D]
    # n states vary in n - 1 directions; what the decomposition has beyond them is arbitrary.
    return torch.linalg.svd(centred, full_matrices=False).Vh[:, : min(PRINCIPAL, len(states) - 1)]
