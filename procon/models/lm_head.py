"""The LM head in float32: its product is neither accumulated in 16 bits nor rounded to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

#: Rows of the head's weight that are float32 at a time.
_ROWS = 16_384


class Float32Head:
    """While :meth:`used`, the LM head of a model gives float32, and what the model does with that is done in float32.

    Soft caps and scales of logits are the model's own code. An adapter's products on the head are float32 too. What
    has its weight in another form (quantised, parallel over devices) runs as ever.
    """

    def __init__(self, head: nn.Module | None) -> None:
        linear = [module for module in head.modules() if isinstance(module, nn.Linear)] if head is not None else []
        # Accelerate, which moves weights between devices, calls the forward that it found by the first name. Made
        # once: for another function, a compiled model would be compiled again.
        names = ["_old_forward" if "_old_forward" in vars(module) else "forward" for module in linear]
        self._ours = [
            (module, name, partial(_forward, module, getattr(module, name)))
            for module, name in zip(linear, names, strict=True)
        ]

    @contextmanager
    def used(self) -> Iterator[None]:
        """The head of float32, within the context."""
        found = [vars(module).get(name) for module, name, _ in self._ours]
        for module, name, ours in self._ours:
            setattr(module, name, ours)
        try:
            yield
        finally:
            for (module, name, _), before in zip(self._ours, found, strict=True):
                if before is None:
                    delattr(module, name)
                else:
                    setattr(module, name, before)


def _forward(module: nn.Linear, own: Callable[..., Any], hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
    weight = module.weight
    known = not isinstance(weight, DTensor) and weight.dtype.is_floating_point and weight.dtype.itemsize > 1
    fits = known and weight.shape == (module.out_features, module.in_features) and type(hidden) is Tensor
    rounds = torch.is_autocast_enabled(hidden.device.type) or min(weight.dtype.itemsize, hidden.dtype.itemsize) < 4
    if args or kwargs or not fits or not rounds:
        return own(hidden, *args, **kwargs)
    product = _Float32Product.apply(hidden.flatten(0, -2), weight)
    product = product.unflatten(0, hidden.shape[:-1])
    return product if module.bias is None else product + module.bias.float()


class _Float32Product(torch.autograd.Function):
    """``hidden [N, D] @ weight[V, D].T`` as float32 ``[N, V]``, of factors in 16 bits, whose products are exact."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        with torch.autocast(hidden.device.type, enabled=False):
            factor = hidden.float()
            return torch.cat([F.linear(factor, rows.float()) for rows in weight.split(_ROWS)], 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (gradient,), (hidden, weight) = gradients, ctx.saved_tensors
        of_hidden = of_weight = None
        with torch.autocast(hidden.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                summed = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
                for columns, rows in zip(gradient.split(_ROWS, 1), weight.split(_ROWS), strict=True):
                    summed.addmm_(columns, rows.float())
                of_hidden = summed.to(hidden.dtype)
            if ctx.needs_input_grad[1]:
                factor, of_weight = hidden.float(), torch.empty_like(weight)
                for columns, rows in zip(gradient.split(_ROWS, 1), of_weight.split(_ROWS), strict=True):
                    rows.copy_(columns.T @ factor)
        return of_hidden, of_weight
