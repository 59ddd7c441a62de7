"""From prompts to what directions are made of: hidden states at the last prompt token, means, and projections."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from procon.chat import ContrastPrompts, pad_token_id, render, user_turn
from procon.errors import ProConError
from procon.models import (
    DecoderForward,
    evaluating,
    find_decoder,
    in_batches,
    model_device,
    observe_block_inputs,
    origin_of,
    transformers_model,
)
from procon.settings import ChatSettings
from procon.version import __version__

#: A mean difference this small beside the hidden states themselves is rounding, not a direction: the first block's
#: input at the last prompt token is one and the same embedding for every prompt.
DEAD_GAP = 1e-5


@dataclass(frozen=True)
class ContrastMeans:
    """Means over each side's prompts of the block inputs at the last prompt token, fp64 on the CPU.

    Attributes:
        malicious, benign: ``[L, D]``.
        scale: ``[L]``, the larger of the two sides' mean norms.
        differences: ``[C, L, D]``, malicious minus benign mean of each category, in alphabetical order; None if they
            were not asked for.
    """

    malicious: Tensor
    benign: Tensor
    scale: Tensor
    differences: Tensor | None = None

    @classmethod
    def measure(
        cls,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        prompts: ContrastPrompts,
        *,
        by_category: bool = False,
        chat: ChatSettings | None = None,
        batch_size: int = 32,
        progress: bool = True,
    ) -> ContrastMeans:
        """Run the prompts through ``model``, and measure its block inputs; ``by_category`` the differences too.

        Raises:
            ProConError: on hidden states that are not finite, or a tokenizer without chat template.
        """
        categories = prompts.categories if by_category else ()
        (malicious, one, first), (benign, other, second) = (
            _mean_last_token(model, tokenizer, side, categories, batch_size, f"prompts {number}/2", progress, chat)
            for number, side in enumerate((prompts.malicious, prompts.benign), 1)
        )
        differences = first - second if by_category else None
        return cls(malicious, benign, torch.maximum(one, other), differences)

    def contrast(self) -> tuple[Tensor, Tensor]:
        """Difference in means as a unit vector, ``[L, D]``, and its length, ``[L]``; both 0 where it is rounding."""
        difference = self.malicious - self.benign
        gap = difference.norm(dim=-1)
        usable = gap > DEAD_GAP * self.scale
        return torch.where(usable[:, None], difference / gap[:, None], 0.0), torch.where(usable, gap, 0.0)


def _mean_last_token(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    categories: Sequence[str],
    batch_size: int,
    description: str,
    progress: bool,
    chat: ChatSettings | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Over prompts, fp64 on the CPU: mean ``[L, D]``, mean norm ``[L]``, and categories' means."""
    decoder = find_decoder(model)
    blocks = len(decoder.blocks)
    total = torch.zeros(blocks, decoder.hidden_size, dtype=torch.float64)
    norms = torch.zeros(blocks, dtype=torch.float64)
    names, category = np.unique(categories, return_inverse=True)
    by_category = torch.zeros(len(names), *total.shape, dtype=torch.float64)

    def consume(rows: list[int], block: int, hidden: Tensor) -> None:
        hidden = hidden.cpu().double()
        total[block] += hidden.sum(0)
        norms[block] += hidden.norm(dim=-1).sum()
        if len(names):
            by_category[:, block].index_add_(0, torch.from_numpy(category[rows]), hidden)

    each_last_token(model, tokenizer, prompts, consume, batch_size, description, progress, chat)
    if not torch.isfinite(total).all():
        bad = int((~torch.isfinite(total)).any(-1).nonzero()[0])
        raise ProConError(
            f"hidden states entering block {bad} are NaN or infinite: load the model in bfloat16 or float32"
        )
    counts = torch.from_numpy(np.bincount(category, minlength=len(names)))
    return total / len(prompts), norms / len(prompts), by_category / counts[:, None, None]


def each_last_token(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    consume: Callable[[list[int], int, Tensor], None],
    batch_size: int,
    description: str,
    progress: bool,
    chat: ChatSettings | None = None,
) -> None:
    """Call ``consume(rows, block, hidden [len(rows), D])`` for every batch of prompts and the input of every block.

    A batch that does not fit in memory is run again in smaller ones.
    """
    forward = DecoderForward(model)
    ids = [render(tokenizer, user_turn(prompt), generation_prompt=True, chat=chat) for prompt in prompts]
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    pad = pad_token_id(tokenizer)

    def run(rows: Sequence[int]) -> None:
        lengths = torch.tensor([len(ids[i]) for i in rows])
        batch = torch.full((len(rows), int(lengths.max())), pad)
        for row, i in enumerate(rows):
            batch[row, : len(ids[i])] = torch.tensor(ids[i])
        mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
        last = (torch.arange(len(rows)), lengths - 1)
        states: dict[int, Tensor] = {}
        with observe_block_inputs(forward.decoder, lambda block, hidden: states.update({block: hidden[last]})):
            forward.run(input_ids=batch.to(forward.device), attention_mask=mask.to(forward.device))
        # Once all of it is there, as a batch that does not fit is run again.
        for block, hidden in states.items():
            consume(list(rows), block, hidden)
        bar.update(len(rows))

    with evaluating(model), tqdm(total=len(ids), desc=description, unit="prompt", disable=not progress) as bar:
        in_batches(order, batch_size, run)


def project_last_token(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    basis: Tensor,
    prompts: Sequence[str],
    *,
    chat: ChatSettings | None = None,
    batch_size: int = 32,
    progress: bool = True,
) -> Tensor:
    """Projections of each prompt's last token on ``basis [L, K, D]``: ``[len(prompts), L, K]`` fp32."""
    z = torch.empty(len(prompts), *basis.shape[:2])
    unit = basis.to(model_device(model))

    def consume(rows: list[int], block: int, hidden: Tensor) -> None:
        z[rows, block] = (hidden.float() @ unit[block].to(hidden.device).mT).cpu()

    each_last_token(model, tokenizer, prompts, consume, batch_size, "projections", progress, chat)
    return z


def auroc(positive: Tensor, negative: Tensor) -> Tensor:
    """Share of pairs in which the positive value is larger, ties counting half: ``[n, ...], [m, ...] -> [...]``."""
    difference = positive[:, None] - negative[None]
    return ((difference > 0).float() + 0.5 * (difference == 0).float()).mean((0, 1))


def further_directions(first: Tensor, differences: Tensor, count: int, smallest: Tensor) -> Tensor:
    """``[L, count, D]``: the main ways in which prompt categories depart from the first direction.

    With the first direction ``r`` and the categories' differences in means ``d_c``, they are the leading right singular
    vectors of the matrix with the rows ``d_c - <d_c, r> r``. Together they are orthonormal. The category with the
    largest difference along a direction, in magnitude, has a positive one.

    Args:
        first: ``[L, D]``, unit rows.
        differences: ``[C, L, D]``, malicious minus benign mean of each category, each counting alike; C > ``count``.
        smallest: ``[L]``, the singular value up to which a direction is rounding; its row is zero.
    """
    rows = differences.movedim(0, 1)
    rest = rows - (rows @ first[:, :, None]) * first[:, None]
    _, length, found = torch.linalg.svd(rest, full_matrices=False)
    length, found = length[:, :count], found[:, :count]
    along = rest @ found.mT  # [L, C, count]
    largest = along.gather(1, along.abs().argmax(1, keepdim=True)).movedim(1, 2)
    return torch.where((length > smallest[:, None])[:, :, None], found * largest.sign(), 0.0)


def hold_out(prompts: ContrastPrompts) -> tuple[ContrastPrompts, ContrastPrompts | None]:
    """Prompts to extract from, and every fifth of each side to measure on; None if a side has fewer than ten."""
    if min(len(prompts.malicious), len(prompts.benign)) < 10:
        return prompts, None
    sides = (prompts.malicious, prompts.benign, prompts.categories)
    kept, out = (
        ContrastPrompts(*(tuple(one for i, one in enumerate(side, 1) if (i % 5 == 0) == held) for side in sides))
        for held in (False, True)
    )
    return kept, out


def provenance_of(model: nn.Module) -> dict[str, Any]:
    """What is kept of the model: name, revision, origin and dtype, and versions; for JSON."""
    described = transformers_model(model)
    versions = {"procon": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    return {
        "model": getattr(described.config, "_name_or_path", ""),
        "revision": getattr(described.config, "_commit_hash", None),
        "origin": origin_of(model),
        "dtype": str(described.dtype),
        "versions": versions,
    }
