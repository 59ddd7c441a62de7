"""SPPFT: the blocks that carry safety do not train (Li et al. 2024, "Safety Layers in Aligned Large Language Models:
The Key to LLM Security", arXiv 2408.17003, section 4).

    theta_l <- theta_l - eta * grad_l    for the blocks l outside of [first, last]; those inside stay as they are

The paper finds the safety layers in the first half, about blocks 6 to 12 of 32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral
from typing import TYPE_CHECKING, Any

from transformers.trainer_utils import TrainOutput

from benchmarks.study.defences.trainer import DefenceTrainer
from procon.errors import ProConError
from procon.models import Decoder, find_decoder

if TYPE_CHECKING:
    from typing_extensions import TypeIs  # typing's from Python 3.13 on


class FrozenLayersTrainer(DefenceTrainer):
    """Trains all but a range of blocks; after :meth:`train`, they require a gradient again as they did before.

    Args:
        blocks: shares of the depth between which blocks are frozen, such as ``(0.2, 0.4)``, or a list of indices.

    Raises:
        ProConError: if that is no range, or has no block, or freezing it would change nothing or leave nothing.
    """

    def __init__(self, *args: Any, blocks: tuple[float, float] | Sequence[int] = (0.2, 0.4), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        decoder = find_decoder(self.model)
        self.blocks = frozen_blocks(blocks, len(decoder.blocks))
        with frozen(decoder, self.blocks) as count:
            if not count:
                raise ProConError(
                    f"nothing in blocks {list(self.blocks)} trains, so freezing them changes nothing: freeze others"
                )
            if not any(parameter.requires_grad for parameter in self.model.parameters()):
                raise ProConError(f"with blocks {list(self.blocks)} frozen nothing trains: freeze fewer")

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        with frozen(find_decoder(self.model), self.blocks):
            return super().train(*args, **kwargs)


@contextmanager
def frozen(decoder: Decoder, blocks: Sequence[int]) -> Iterator[int]:
    """Within the context no parameter of ``blocks`` requires a gradient; gives how many did before."""
    parameters = [p for block in blocks for p in decoder.blocks[block].parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield len(parameters)
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def frozen_blocks(blocks: tuple[float, float] | Sequence[int], count: int) -> tuple[int, ...]:
    """The indices that ``blocks`` says, of ``count``; shares of the depth are rounded to one or more whole blocks."""
    if _are_shares(blocks):
        first, last = blocks
        if not 0 <= first < last <= 1:
            raise ProConError(f"frozen blocks are the shares {first:g} to {last:g}: give two rising ones from 0 to 1")
        begin = min(round(first * count), count - 1)
        chosen = tuple(range(begin, max(round(last * count), begin + 1)))
    else:
        if not all(isinstance(block, Integral) and not isinstance(block, bool) for block in blocks):
            raise ProConError(
                f"frozen blocks are {list(blocks)}: give two shares of the depth, such as 0.2 and 0.4, or indices"
            )
        chosen = tuple(sorted(set(blocks)))
    if not chosen or chosen[0] < 0 or chosen[-1] >= count:
        raise ProConError(f"frozen blocks are {list(blocks)}, of a model that has {count}: give some from 0 on")
    return chosen


def _are_shares(blocks: tuple[float, float] | Sequence[int]) -> TypeIs[tuple[float, float]]:
    return len(blocks) == 2 and float in map(type, blocks) and all(isinstance(share, float | int) for share in blocks)
