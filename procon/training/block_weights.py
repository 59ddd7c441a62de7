"""The weights of the constrained blocks, found in the model that training starts from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from procon.directions import Directions
from procon.errors import ProConError
from procon.evaluation import block_effects, causal_weights
from procon.settings import BlockWeights, ChatSettings, Units
from procon.training.ranks import on_main


def find_weights(
    block_weights: BlockWeights,
    model: nn.Module,
    tokenizer: Any,
    directions: Directions,
    blocks: Sequence[int],
    chat: ChatSettings | None = None,
) -> dict[Units, Tensor] | None:
    """How much each of the ``blocks`` counts in either unit; None if all count alike. All ranks must ask.

    A resumed training takes them from its checkpoint: what it trains is no longer the model that it started from.

    Raises:
        ProConError: on every rank, if they are causal and directions are of other concepts, there is no chat template
            to ask the model with, the model does not refuse, or it is sharded.
    """
    if block_weights == "equal":
        return None
    if not directions.of_refusal:
        raise ProConError(
            "block_weights is 'causal', which weighs blocks by their effect on refusals, and these are directions of "
            f"{', '.join(directions.concepts)}: set block_weights to 'equal'"
        )
    if getattr(tokenizer, "chat_template", None) is None:
        raise ProConError(
            "block_weights is 'causal', and there is no tokenizer with a chat template to ask the starting model with: "
            "pass one as processing_class, or set block_weights to 'equal'"
        )
    return on_main(lambda: causal_weights(block_effects(model, tokenizer, directions, chat=chat), directions, blocks))


def as_json(weights: dict[Units, Tensor] | None) -> dict[str, list[float]] | None:
    """What ``procon.json`` has of them: every fp32 number as it is."""
    return None if weights is None else {str(units): each.tolist() for units, each in weights.items()}
