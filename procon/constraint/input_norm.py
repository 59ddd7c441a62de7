"""The RMSNorm through which a decoder block reads its input, found by structure and not by a list of model names."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from procon.ops import rms_norm

#: Share of bfloat16 results that must be bitwise a rule's. Another rule rounds many of them otherwise; the same rule in
#: another order of summation very few.
_AGREEMENT = 0.99


@dataclass(frozen=True)
class InputNorm:
    """An RMSNorm module and its rule, in the terms of :func:`procon.ops.rms_norm_constrain`."""

    module: nn.Module
    eps: float
    casting: str
    offset: float


def find_input_norm(block: nn.Module, hidden_size: int) -> InputNorm | None:
    """The RMSNorm that ``block`` calls on its own input before it computes anything; None if there is none.

    Nothing is computed with the model's weights, so they may be on any device, sharded or without storage.
    """
    norms = [module for module in block.modules() if _looks_like_rms_norm(module, hidden_size)]
    module = _first_called(block, norms, hidden_size)
    return None if module is None else _with_rule(module, hidden_size)


def _looks_like_rms_norm(module: nn.Module, hidden_size: int) -> bool:
    # A forward of its own is another library's kernel, or a wrapper that must not be gone around. That of a copy of a
    # constrained model is its class's.
    own = vars(module).get("forward")
    parameters = dict(module.named_parameters())
    return (
        list(parameters) == ["weight"]
        # DeepSpeed ZeRO-3 leaves no elements in a partitioned parameter, and notes its shape.
        and getattr(parameters["weight"], "ds_shape", parameters["weight"].shape) == (hidden_size,)
        and isinstance(_eps(module), float)
        and (own is None or getattr(own, "__func__", None) is type(module).forward)
    )


def _eps(module: nn.Module) -> float | None:
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


class _Called(Exception):
    def __init__(self, module: nn.Module | None) -> None:
        super().__init__()
        self.module = module


def _first_called(block: nn.Module, norms: list[nn.Module], hidden_size: int) -> nn.Module | None:
    """The norm that is called first, if it is called on the block's input itself.

    The block runs on a tensor without storage up to that call, which comes before any other use of the input. A block
    that does anything else first gives an answer or an error that is not the signal waited for.
    """
    hidden = torch.empty(1, 1, hidden_size, device="meta")

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        alone = len(args) == 1 and not kwargs
        raise _Called(module if alone and args[0] is hidden else None)

    handles = [norm.register_forward_pre_hook(stop, prepend=True, with_kwargs=True) for norm in norms]
    parameters = list(inspect.signature(block.forward).parameters.values())[1:]
    required = {p.name: None for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
    try:
        with torch.no_grad():
            block.forward(hidden, **required)
    except _Called as called:
        return called.module
    except Exception:
        return None
    finally:
        for handle in handles:
            handle.remove()
    return None


def _with_rule(module: nn.Module, hidden_size: int) -> InputNorm | None:
    """The rule whose results, on random numbers and another weight, are the module's own; None if there is none."""
    if (eps := _eps(module)) is None:
        return None
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(16, hidden_size, generator=random).to(torch.bfloat16)
    weight = torch.randn(hidden_size, generator=random)

    def agrees(norm: InputNorm) -> bool:
        for dtype in (torch.bfloat16, torch.float32):
            expected = _call_with_weight(module, weight.to(dtype), hidden)
            found = rms_norm(
                hidden, weight.to(dtype), norm.eps, casting=norm.casting, offset=norm.offset, backend="eager"
            )
            if found.dtype != expected.dtype or (found == expected).float().mean() < _AGREEMENT:
                return False
        return True

    candidates = (InputNorm(module, eps, *rule) for rule in product(("llama", "gemma"), (0.0, 1.0)))
    try:
        return next((norm for norm in candidates if agrees(norm)), None)
    except Exception:
        # For example a kernel that runs on a GPU only: this norm is left to itself.
        return None


def _call_with_weight(module: nn.Module, weight: Tensor, hidden: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.func.functional_call(module, {"weight": weight}, (hidden,))
