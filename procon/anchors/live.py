"""Live anchors: the projections of a batch under the starting model, from a forward when the batch is trained on.

Nothing is recorded beforehand, so tokens may come from a stream, from augmentation, or from the model itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn

from procon.anchors.recording import checked_blocks, project_block_inputs
from procon.directions import Directions
from procon.errors import ProConError
from procon.models import DecoderForward, StartingModel, evaluating, find_decoder, model_device, unwrapped, weights_hash
from procon.sequences import decoder_inputs

_Result = TypeVar("_Result")

#: How a record calls a starting model that is the model with its adapters off.
ADAPTERS_OFF = "adapters off"


class LiveAnchors:
    """Anchors from a forward of the starting model on the same batch, without gradients and without the LM head.

    Under a fresh adapter that forward is the model's with the adapter off, at no memory. Otherwise the trainable
    parameters are copied once (:class:`procon.models.StartingModel`), unless there is a reference model.

    Args:
        model: a transformers causal LM about to be trained, also within PEFT or DDP; under FSDP2 or ZeRO-3 with a
            fresh adapter.
        directions: of this model.
        blocks: indices of the blocks, as of the constraint; all that have a direction if not given.
        adapters_off: of :class:`procon.models.StartingModel`.
        reference: the starting model as a module of its own, which the trainer has anyway.

    Attributes:
        start: what the starting model is: ``"adapters off"``, or the hash of its weights.

    Raises:
        ProConError: if the directions are of another model, the reference has other weights or trains with the model,
            or what :class:`procon.models.StartingModel` raises.
    """

    def __init__(
        self,
        model: nn.Module,
        directions: Directions,
        *,
        blocks: Sequence[int] | None = None,
        adapters_off: bool | None = None,
        reference: nn.Module | None = None,
    ) -> None:
        model = unwrapped(model)
        self.blocks = checked_blocks(model, directions, blocks)
        self._model = model
        self._basis = directions.basis
        self._reference = reference
        if reference is None:
            self._start = StartingModel(model, decoder_only=True, adapters_off=adapters_off)
            self._decoder = find_decoder(model)
            self.start = ADAPTERS_OFF if self._start.adapters_off else weights_hash(model)
            return
        if {id(parameter) for parameter in model.parameters()} & {id(p) for p in reference.parameters()}:
            raise ProConError(
                "the reference model shares parameters with the model, so it trains as well: pass a copy, or none"
            )
        self.start = weights_hash(reference)
        if self.start != weights_hash(model):
            raise ProConError(
                "the reference model has other weights than the model that training starts from, so its projections "
                "are no anchors: leave ref_model out, or take procon_terms 'probes'"
            )
        self._decoder = find_decoder(reference)

    def __call__(self, batch: Mapping[str, Any]) -> Tensor:
        """Anchors ``[B, T, len(blocks) * K]`` fp32 of a batch of text, on the model's device."""
        inputs = decoder_inputs(batch, model_device(self._model))

        def run() -> None:
            if self._reference is None:
                self._start(**inputs)
            else:
                with evaluating(self._reference):
                    DecoderForward(self._reference).run(**inputs)

        return self.of(run, len(inputs["input_ids"]))[1]

    def of(self, run: Callable[[], _Result], rows: int) -> tuple[_Result, Tensor]:
        """What ``run`` gives, which runs the starting model for the trainer, and the anchors of its first ``rows``."""
        device = model_device(self._model)
        self._basis = self._basis.to(device)
        return project_block_inputs(run, self._decoder, self._basis, self.blocks, rows=rows, device=device)
