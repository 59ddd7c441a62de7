"""What does a shift along a block's direction do to refusals? The derivative of the refusal log-odds, block by block.

Not in the paper. From it come the ``"causal"`` weights of the blocks in the constraint: where a shift of the hidden
states costs many refusals, it is penalised more.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from procon.chat import ContrastPrompts, builtin_prompts
from procon.directions import Directions
from procon.errors import ProConError
from procon.evaluation.refusal_odds import first_token_logits, log_odds_of, refusal_tokens
from procon.models import evaluating, find_decoder, is_sharded, observe_sites, site_name
from procon.settings import ChatSettings, Units

#: Pairs of built-in prompts: one of each category.
_PROBES = 16


def block_effects(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    directions: Directions,
    prompts: ContrastPrompts | None = None,
    *,
    tokens: Sequence[int] | None = None,
    chat: ChatSettings | None = None,
    batch_size: int = 8,
) -> Tensor:
    """``d f / d s_lk``, f the mean of :func:`refusal_log_odds` over malicious prompts, by one backward.

    ``s_lk`` shifts the input of block ``l`` along its direction ``k`` at the prompts' last token, where directions were
    found and the reply begins. Positive: a shift towards the malicious mean makes refusals likelier.

    Args:
        directions: of ``L`` rows: the blocks, and the last one's output if they have it; ``K`` per row.
        prompts: the malicious ones are the probes; 16 built-in pairs if not given.
        tokens: those by which the model opens refusals; those of :func:`refusal_tokens` on ``prompts`` if not given.
        chat: how the model is asked: system prompt and variables of its chat template.
        batch_size: prompts whose block inputs are in memory at a time.

    Returns:
        ``[L, K]`` fp32 on the CPU, log-odds per gap of the row; NaN where it has no direction.

    Raises:
        ProConError: if the directions do not fit, the model does not refuse, is sharded, or its gradients are not
            finite.
    """
    if is_sharded(model):
        raise ProConError(
            "causal block weights need a backward through the whole model, and this one is sharded: load it whole, or "
            "set block_weights to 'equal'"
        )
    decoder = find_decoder(model)
    directions.check_fits(decoder)
    prompts = prompts or builtin_prompts("extraction").first(_PROBES)
    tokens = refusal_tokens(model, tokenizer, prompts, chat=chat) if tokens is None else tokens
    basis = directions.basis.double() * directions.gaps[:, :1, None].double()
    effects = torch.zeros(basis.shape[:2], dtype=torch.float64)
    states: list[Tensor] = []

    def keep(site: int, hidden: Tensor) -> None:
        if not hidden.requires_grad:  # nothing that trains has fed it
            hidden.requires_grad_()
        if site < len(basis):
            states.append(hidden)

    with evaluating(model), torch.enable_grad(), observe_sites(decoder, keep):
        for _, logits in first_token_logits(model, tokenizer, prompts.malicious, batch_size, chat):
            odds = log_odds_of(logits.float().log_softmax(-1), tokens)
            gradients = torch.autograd.grad(odds.sum(), states, materialize_grads=True)
            for site, gradient in enumerate(gradients):
                effects[site] += basis[site] @ gradient[:, -1].cpu().double().sum(0)
            states.clear()
    if not torch.isfinite(effects).all():
        raise ProConError(
            "the gradient of the refusal log-odds is NaN or infinite: load the model in bfloat16 or float32"
        )
    effects /= len(prompts.malicious)
    return torch.where(directions.usable[:, None], effects, torch.nan).float()


def causal_weights(effects: Tensor, directions: Directions, blocks: Sequence[int]) -> dict[Units, Tensor]:
    """Weights of the constrained blocks, in proportion to what a departure of 1 does to the refusal log-odds.

    A departure of 1 is a gap in units of the gap, and a length of 1 in raw ones. Of several directions per block it is
    the one, within their span, that does most: the length of the vector of their effects.

    Args:
        effects: ``[L, K]`` of :func:`block_effects`.
        blocks: those of the constraint, in its order.

    Returns:
        By unit, ``[len(blocks)]`` fp32 of mean 1; for :class:`procon.ProjectionConstraint`.

    Raises:
        ProConError: if a block has no effect at all.
    """
    chosen = list(blocks)
    size = effects.double().norm(dim=1)[chosen]
    for block, found in zip(chosen, size.tolist(), strict=True):
        if not found > 0:
            raise ProConError(
                f"shifting the hidden states {site_name(block, directions.block_count)} along their direction does "
                f"nothing to the refusal log-odds, so block {block} has no causal weight: leave it out of blocks, or "
                "set block_weights to 'equal'"
            )
    sizes: dict[Units, Tensor] = {"raw": size / directions.gaps[:, 0].double()[chosen], "gap": size}
    return {units: (each / each.mean()).float() for units, each in sizes.items()}
