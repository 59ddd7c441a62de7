"""What a model was when training started, at the price of its trainable parameters, or of nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.func import functional_call

from procon.errors import ProConError
from procon.models.decoder import DecoderForward, is_sharded, observe_last_state
from procon.models.eval_mode import evaluating


class StartingModel:
    """Runs a model as it was when this was made: a fresh adapter, one that is trained further, or all weights.

    If the model without its adapters computes the same, as it does under a fresh LoRA adapter, a forward switches them
    off, and nothing is copied. Otherwise the trainable parameters are copied, and a forward has the copies in place of
    the model's own.

    Args:
        model: the model about to be trained, not wrapped for several devices.
        decoder_only: leave out the LM head, as far as the model can.
        adapters_off: whether the start is the model without its adapters; found out if not given, which is too late
            once they are trained.

    Raises:
        ProConError: if nothing in the model trains, adapters are merged or off, or a sharded model would need copies.
    """

    def __init__(self, model: nn.Module, *, decoder_only: bool = False, adapters_off: bool | None = None) -> None:
        self._model, self._decoder_only = model, decoder_only
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ProConError("nothing in the model trains: make its parameters require a gradient, or add an adapter")
        for layer in _adapter_layers(model):
            if layer.disable_adapters or (isinstance(layer, BaseTunerLayer) and layer.merged):
                raise ProConError(
                    "the adapter is switched off or merged into the model, so what trains is not in use: switch it on, "
                    "or unmerge it, first"
                )
        self.adapters_off = self._starts_without_adapters() if adapters_off is None else adapters_off
        if not self.adapters_off and is_sharded(model):
            raise ProConError(
                "the starting model cannot be copied, as its parameters are sharded over the ranks: train a fresh LoRA "
                "adapter, or take probes, or recorded anchors if the data are there beforehand"
            )
        self._copies = {
            parameter: parameter.detach().clone()
            for parameter in model.parameters()
            if parameter.requires_grad and not self.adapters_off
        }

    def __call__(self, **inputs: Any) -> Any:
        """The model's output for ``inputs``: without dropout and without gradient."""
        # Asked each time: once prepared for training, the whole model may be what brings its precision.
        forward = DecoderForward(self._model).least if self._decoder_only else partial(self._model)
        module: Any = forward.func
        with evaluating(self._model):
            if self.adapters_off:
                with without_adapters(self._model):
                    return forward(**inputs)
            self._copies = {parameter: copy.to(parameter.device) for parameter, copy in self._copies.items()}
            named = {
                name: self._copies[parameter]
                for name, parameter in module.named_parameters()
                if parameter in self._copies
            }
            return functional_call(module, named, args=(), kwargs={**forward.keywords, **inputs})

    def _starts_without_adapters(self) -> bool:
        """Whether switching the adapters off changes nothing now, and will undo all that training changes."""
        if not _adapter_layers(self._model):
            return False
        forward = DecoderForward(self._model)
        tokens = {"input_ids": torch.arange(8, device=forward.device)[None]}
        found: list[torch.Tensor] = []
        with evaluating(self._model), observe_last_state(forward.decoder, found.append):
            forward.run(**tokens)
            with without_adapters(self._model):
                if any(parameter.requires_grad for parameter in self._model.parameters()):
                    return False  # something else trains as well
                forward.run(**tokens)
        return torch.equal(*found)


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Within the context, the adapters of ``model`` are off; which parameters train is as before afterwards."""
    layers = _adapter_layers(model)
    trains = {parameter: parameter.requires_grad for parameter in model.parameters()}
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter, required in trains.items():
            parameter.requires_grad_(required)


def _adapter_layers(model: nn.Module) -> list[BaseTunerLayer | AuxiliaryTrainingWrapper]:
    return [module for module in model.modules() if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
