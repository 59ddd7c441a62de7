"""What attaching leaves on modules, made so that copies of a model are free of it, deep copies and pickled ones."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from torch import nn

#: Of a module's call: positional and named.
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class Hook:
    """A hook of a module; its place in a copy of the module is taken by a function that does nothing."""

    def __init__(self, hook: Callable[..., Any]) -> None:
        self._hook = hook

    def __call__(self, *args: Any) -> Any:
        return self._hook(*args)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        # Of the standard library, takes anything, returns None: who loads the model does not need this package.
        return getattr, (nullcontext(), "__exit__")


class ModuleForward:
    """A forward of ``module``; its place in a copy of the module is taken by the forward of the module's class."""

    def __init__(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        self._module = module
        self._forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._forward(*args, **kwargs)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        # The copied module exists by then, without attributes: this is its class's own.
        return getattr, (self._module, "forward")
