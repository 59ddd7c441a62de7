"""Preventative steering: the trait to be prevented is added to the hidden states while training, so that the weights
need not learn it (Chen et al. 2025, "Persona Vectors", arXiv 2507.21509, section 5.2).

    x_l <- x_l + strength * v_l    in training forwards only

Against the loss of refusal the trait is compliance: v_l = -gap_l * r_l, from the malicious towards the benign mean of
block l, so that a strength of 1 moves a malicious prompt to where benign ones are. Steering several blocks, each adds
what v_l has over the v of the steered block before it, as the residual stream carries that along already.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from transformers.trainer_utils import TrainOutput

from benchmarks.study.defences.trainer import DefenceTrainer
from procon.constraint import select_blocks
from procon.directions import Directions
from procon.errors import ProConError
from procon.models import block_input, find_decoder
from procon.settings import Blocks

#: Positional and keyword arguments.
_Call = tuple[tuple[Any, ...], dict[str, Any]]


class SteeringTrainer(DefenceTrainer):
    """Trains a model that is steered towards compliance; in evaluation, and after training, nothing is.

    Args:
        directions: refusal directions of the model as training starts.
        strength: of the steering, in units of each block's distance between the malicious and the benign mean.
        blocks: ``"all"`` that have a direction, a list of indices, or a fraction: the deepest share of them.

    Raises:
        ProConError: if the directions do not fit the model, or the strength is not positive.
    """

    def __init__(
        self,
        *args: Any,
        directions: Directions,
        strength: float = 0.25,
        blocks: Blocks = "all",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if not 0 < strength < math.inf:
            raise ProConError(f"strength is {strength:g}: give a finite number above 0")
        directions.check_fits(find_decoder(self.model))
        if not directions.of_refusal:
            raise ProConError("steering goes against refusal, and these are directions of other concepts: extract some")
        directions = directions.at_block_inputs
        self.blocks = select_blocks(directions, blocks)
        compliance = -strength * (directions.gaps[:, :1] * directions.basis[:, 0])[list(self.blocks)]
        self._steps = compliance.clone()
        self._steps[1:] -= compliance[:-1]

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        with self._steering():
            return super().train(*args, **kwargs)

    @contextmanager
    def _steering(self) -> Iterator[None]:
        decoder = find_decoder(self.model)
        with ExitStack() as stack:
            for block, step in zip(self.blocks, self._steps, strict=True):
                hook = decoder.blocks[block].register_forward_pre_hook(_add(step), with_kwargs=True)
                stack.callback(hook.remove)
            yield


def _add(step: Tensor) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], _Call | None]:
    """A forward pre-hook for a block: adds ``step``, ``[D]``, to its input in training."""

    def pre_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call | None:
        if not module.training:
            return None
        hidden = block_input(args, kwargs)
        hidden = hidden + step.to(hidden.device, hidden.dtype)
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    return pre_forward
