"""What a model was when training started, at the price of its trainable parameters."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.func import functional_call

from procon.errors import ProConError
from procon.models import evaluating


class StartingModel:
    """Runs a model as it was when this was made: a fresh adapter, one that is trained further, or all weights.

    Only trainable parameters are copied, a few megabytes under LoRA; a forward has them in place of the model's own.
    Switching the adapter off instead would be right for a fresh one alone.

    Args:
        model: the model about to be trained, not wrapped for several devices.

    Raises:
        ProConError: if nothing in the model trains.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._parameters = {
            name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.requires_grad
        }
        if not self._parameters:
            raise ProConError("nothing in the model trains: make its parameters require a gradient, or add an adapter")

    def __call__(self, **inputs: Any) -> Any:
        """The model's output for ``inputs``: without dropout and without gradient."""
        device = next(self._model.parameters()).device
        self._parameters = {name: tensor.to(device) for name, tensor in self._parameters.items()}
        with evaluating(self._model):
            return functional_call(self._model, self._parameters, args=(), kwargs=inputs)
