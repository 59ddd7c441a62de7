"""The RMSNorm through which a decoder block reads its input, found by structure and not by a list of model names."""

from __future__ import annotations

import inspect
from copy import copy
from dataclasses import dataclass
from itertools import product
from types import MethodType
from typing import Any

import torch
from torch import nn

from procon.models import Decoder
from procon.ops import rms_norm

#: Share of bfloat16 results that must be bitwise a rule's. Another rule rounds many of them otherwise; the same rule in
#: another order of summation very few.
_AGREEMENT = 0.99

#: Mean squares of the rows that rules are compared on, as multiples of eps and as numbers.
_MEAN_SQUARES = ((0.1, 0.0), (1.0, 0.0), (10.0, 0.0), (0.0, 1.0))


@dataclass(frozen=True)
class InputNorm:
    """An RMSNorm module and its rule, in the terms of :func:`procon.ops.rms_norm_constrain`."""

    module: nn.Module
    eps: float
    casting: str
    offset: float


def find_norm(decoder: Decoder, index: int) -> InputNorm | str:
    """The RMSNorm that reads the input of block ``index``; or why there is none that can do the constraint's work.

    A kernel of the hub in the norm's place does not count: the rule is that of the norm's class. Nothing is computed
    with the model's weights, so they may be on any device, sharded or without storage.
    """
    block, size = decoder.blocks[index], decoder.hidden_size
    norms = [module for module in block.modules() if _looks_like_rms_norm(module, size)]
    if not norms:
        return "its blocks have no RMSNorm"
    module = _first_called(block, norms, size)
    if module is None:
        return "its blocks read their input before an RMSNorm does"
    if _patched(module):
        return "another package has put its own forward into its norms"
    return _with_rule(module, size) or f"{type(module).__name__} computes something else than the known RMSNorms"


def _looks_like_rms_norm(module: nn.Module, hidden_size: int) -> bool:
    parameters = dict(module.named_parameters())
    return (
        list(parameters) == ["weight"]
        # DeepSpeed ZeRO-3 leaves no elements in a partitioned parameter, and notes its shape.
        and getattr(parameters["weight"], "ds_shape", parameters["weight"].shape) == (hidden_size,)
        and not list(module.buffers())  # such as statistics, which a call may change
        and isinstance(_eps(module), float)
    )


def is_the_hubs(module: nn.Module) -> bool:
    """Whether the package ``kernels`` decides what ``module`` runs now: its class's forward, or a kernel of the hub.

    The package puts a kernel there, or takes it away, whenever the model changes between training and evaluation. It
    takes no notice of what it removes. Before version 0.19 it did not mark its kernels.
    """
    own = vars(module).get("forward")
    # A copy of a constrained model has the class's own.
    return own is None or getattr(own, "__func__", None) is type(module).forward or "_kernel_repo" in vars(module)


def _patched(module: nn.Module) -> bool:
    """Whether it has a forward of another library, such as a wrapper, that is not to be gone around."""
    return not is_the_hubs(module)


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
    # Some blocks convert their input to the dtype of the norm's weight: then it is the same tensor.
    dtype: Any = norms[0].weight.dtype
    hidden = torch.empty(1, 1, hidden_size, device="meta", dtype=dtype)
    version = hidden._version

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        alone = len(args) == 1 and not kwargs and args[0] is hidden and hidden._version == version
        raise _Called(module if alone and module in norms else None)

    # Wrappers, such as those that move weights between devices, are not to do their work for nothing.
    stops = [*norms, *(module for module in block.modules() if module is not block and _patched(module))]
    handles = [module.register_forward_pre_hook(stop, prepend=True, with_kwargs=True) for module in stops]
    forward = MethodType(type(block).forward, block)
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    required = {p.name: None for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
    try:
        with torch.no_grad():
            forward(hidden, **required)
    except _Called as called:
        return called.module
    except Exception:
        return None
    finally:
        for handle in handles:
            handle.remove()
    return None


def _with_rule(module: nn.Module, hidden_size: int) -> InputNorm | None:
    """The rule whose results, on random numbers and another weight, are the module's own; None if there is none.

    With outliers, and where eps counts: rules that treat it otherwise differ there.
    """
    if (eps := _eps(module)) is None:
        return None
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(len(_MEAN_SQUARES) + 1, 4, hidden_size, generator=random)
    for rows, (of_eps, alone) in zip(hidden, _MEAN_SQUARES, strict=False):
        rows *= (of_eps * eps + alone) ** 0.5
    hidden[-1, :, 0] = 1e4
    hidden = hidden.to(torch.bfloat16)
    weights = [torch.randn(hidden_size, generator=random).to(dtype) for dtype in (torch.bfloat16, torch.float32)]

    def follows(norm: InputNorm) -> bool:
        rule: dict[str, Any] = {"casting": norm.casting, "offset": norm.offset, "backend": "eager"}
        found = [rms_norm(hidden, weight, eps, **rule) for weight in weights]
        return all(
            one.dtype == other.dtype and (one == other).float().mean((1, 2)).min() >= _AGREEMENT
            for one, other in zip(found, expected, strict=True)
        )

    try:
        with torch.no_grad():
            of_class = copy(module)  # a shallow one, without a kernel of the hub
            vars(of_class).pop("forward", None)
            expected = [torch.func.functional_call(of_class, {"weight": weight}, (hidden,)) for weight in weights]
            candidates = (InputNorm(module, eps, *rule) for rule in product(("llama", "gemma"), (0.0, 1.0)))
            return next(norm for norm in candidates if follows(norm))
    except Exception:
        # No candidate, or for example a kernel that runs on a GPU only: this norm is left to itself.
        return None
