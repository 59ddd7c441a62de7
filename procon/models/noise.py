"""Dropout and jitter, and forwards of a model in training without them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

#: What such settings are called.
_NAME = re.compile(r"drop|jitter|noise")

#: Where transformers keeps what it checkpoints blocks with.
_CHECKPOINT = "_gradient_checkpointing_func"


class Noise:
    """What modules of a model draw random numbers by in training: dropout, jitter of routers.

    Attributes:
        settings: owner (a module, or the configuration that modules read), name and strength of each.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        owners = {id(owner): owner for module in modules for owner in (module, vars(module).get("config"))}
        self.settings: list[tuple[Any, str, float]] = [
            (owner, name, value)
            for owner in owners.values()
            for name, value in (vars(owner) if hasattr(owner, "__dict__") else {}).items()
            if isinstance(value, float) and value > 0 and (_NAME.search(name) or _is_dropout(owner, name))
        ]
        self._checkpointing = [module for module in modules if _CHECKPOINT in vars(module)] if self.settings else []
        self._quiet: dict[Callable[..., Any], Callable[..., Any]] = {}

    @contextmanager
    def off(self) -> Iterator[None]:
        """Within the context, forwards are without it, in whatever mode the modules are, and draw nothing.

        So do their checkpointed blocks, when these run again in backward, beside those of forwards with noise. The
        modes stay: on them it hangs whether blocks are checkpointed, and how quantised layers compute.
        """
        found = [(module, getattr(module, _CHECKPOINT)) for module in self._checkpointing]
        drawn = torch.get_rng_state()  # older OPTs draw for each layer, whether it may be dropped or not
        for module, checkpoint in found:
            setattr(module, _CHECKPOINT, self._quietly(checkpoint))
        try:
            with self._silenced():
                yield
        finally:
            torch.set_rng_state(drawn)
            for module, checkpoint in found:
                setattr(module, _CHECKPOINT, checkpoint)

    @contextmanager
    def _silenced(self) -> Iterator[None]:
        for owner, name, _ in self.settings:
            setattr(owner, name, 0.0)
        try:
            yield
        finally:
            for owner, name, strength in self.settings:
                setattr(owner, name, strength)

    def _quietly(self, checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        """``checkpoint(function, ...)`` whose function is without noise, when it runs first and when it runs again."""
        if checkpoint not in self._quiet:

            def quiet(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
                def run(*args: Any, **kwargs: Any) -> Any:
                    with self._silenced():
                        return function(*args, **kwargs)

                return checkpoint(run, *args, **kwargs)

            self._quiet[checkpoint] = quiet
        return self._quiet[checkpoint]


def _is_dropout(owner: Any, name: str) -> bool:
    return name == "p" and isinstance(owner, nn.modules.dropout._DropoutNd)
