"""Live anchors: the projections of a batch under the starting model, from a forward when the batch is trained on.

Nothing is recorded beforehand, so tokens may come from a stream, from augmentation, or from the model itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn

from procon.anchors.projections import project_sites
from procon.directions import RefusalDirections
from procon.models import StartingModel, find_decoder, model_device, unwrapped, weights_hash
from procon.sequences import decoder_inputs
from procon.settings import DEFAULTS, Backend, check_setting

_Result = TypeVar("_Result")

#: How a record calls a starting model that is the model with its adapters off.
ADAPTERS_OFF = "adapters off"


class LiveAnchors:
    """Anchors from a forward of the starting model on the same batch, without gradients and without the LM head.

    Under a fresh adapter that forward is the model's with the adapter off, at no memory. Otherwise the trainable
    parameters are copied once (:class:`procon.models.StartingModel`).

    Args:
        model: a transformers causal LM about to be trained, also within PEFT or DDP; under FSDP2 or ZeRO-3 with a
            fresh adapter.
        directions: of this model.
        blocks: indices of the blocks; all that have a direction if not given.
        backend: of :func:`procon.ops.project`.
        adapters_off: of :class:`procon.models.StartingModel`.

    Raises:
        ProConError: if the directions are of another model, or what :class:`procon.models.StartingModel` raises.
    """

    def __init__(
        self,
        model: nn.Module,
        directions: RefusalDirections,
        *,
        blocks: Sequence[int] | None = None,
        backend: Backend = DEFAULTS.backend,
        adapters_off: bool | None = None,
    ) -> None:
        check_setting("backend", backend)
        model = unwrapped(model)
        self._decoder = find_decoder(model)
        directions.check_fits(self._decoder)
        directions.check_origin(model)
        self.blocks = tuple(blocks if blocks is not None else directions.usable.nonzero().flatten().tolist())
        self._basis = directions.basis
        self._backend: Backend = backend
        self._model = model
        self._start = StartingModel(model, decoder_only=True, adapters_off=adapters_off)

        #: What the starting model is: the model with its adapters off, or the hash of its weights.
        self.start = ADAPTERS_OFF if self._start.adapters_off else weights_hash(model)

    def __call__(self, batch: Mapping[str, Any]) -> Tensor:
        """Anchors ``[B, T, len(blocks) * K]`` fp32 of a batch, on the model's device.

        Raises:
            ProConError: for a batch that is not of text alone, and for a block that does not run.
        """
        inputs = decoder_inputs(batch, model_device(self._model))
        return self.of(lambda: self._start(**inputs), len(inputs["input_ids"]))[1]

    def of(self, reference: Callable[[], _Result], rows: int, model: nn.Module | None = None) -> tuple[_Result, Tensor]:
        """What ``reference`` gives, and the anchors of the first ``rows`` sequences that it runs.

        Args:
            reference: runs the starting model, without gradients, for a reason of its own.
            model: what it runs, if that is another module than the model that is trained.
        """
        decoder = self._decoder if model is None else find_decoder(unwrapped(model))
        device = model_device(self._model)
        self._basis = self._basis.to(device)
        return project_sites(
            reference, decoder, self._basis, self.blocks, rows=rows, backend=self._backend, device=device
        )
