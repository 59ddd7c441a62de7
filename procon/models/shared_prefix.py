"""Prompts that begin alike: what they share runs once, and its keys and values serve them all."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from procon.models.decoder import transformers_model, unwrapped

#: Shorter beginnings, and fewer prompts, are not worth the trial.
_LEAST_TOKENS, _LEAST_PROMPTS = 8, 16

#: Relative change of a hidden state that counts as rounding: at least, and in units of the dtype's resolution.
_ROUNDING, _ROUNDING_UNITS = 1e-3, 16


class SharedPrefix:
    """Keys and values of the tokens that all of several prompts begin with: a template's head and a system prompt.

    That is half of a short prompt. First :meth:`record` them from prompts that run whole, then :meth:`keep` them, and
    run other prompts on :meth:`inputs`, without the first :attr:`length` tokens but with the mask of all.

    Args:
        argument: of the model's forward, by which it takes a cache.
        length: tokens of the beginning.
    """

    def __init__(self, model: nn.Module, argument: str, length: int) -> None:
        self.length = length
        self._config = transformers_model(unwrapped(model)).config
        self._argument = argument
        self._recorded = DynamicCache(config=self._config)
        self._kept: list[tuple[Tensor, Tensor]] = []

    @classmethod
    def find(cls, model: nn.Module, prompts: Sequence[Sequence[int]]) -> SharedPrefix | None:
        """That of ``prompts``, as token ids; each has a token of its own after it.

        None if there is little to share, or the model keeps anything but the keys and values of all tokens: windows of
        them, or the states of recurrent blocks.
        """
        base = transformers_model(unwrapped(model))
        columns = enumerate(zip(*prompts, strict=False))
        shortest = min(map(len, prompts), default=0)
        length = min(next((at for at, column in columns if len(set(column)) > 1), shortest), shortest - 1)
        if length < _LEAST_TOKENS or len(prompts) < _LEAST_PROMPTS:
            return None
        if not type(base).__module__.startswith("transformers."):
            return None
        taken = inspect.signature(base.forward).parameters
        argument = next((name for name in ("cache", "past_key_values") if name in taken), None)
        layers = DynamicCache(config=base.config).layers
        if argument is None or not layers or any(type(layer) is not DynamicLayer for layer in layers):
            return None
        return cls(model, argument, length)

    def record(self) -> dict[str, Any]:
        """Arguments of a forward of whole prompts, padded on the right."""
        self._recorded = DynamicCache(config=self._config)
        return {self._argument: self._recorded, "use_cache": True}

    def keep(self) -> bool:
        """Keep the beginning of what was recorded; False if a block has recorded something else."""
        layers, self._recorded = self._recorded.layers, DynamicCache(config=self._config)
        self._kept = []
        for layer in layers:
            keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
            if not (isinstance(keys, Tensor) and isinstance(values, Tensor) and keys.dim() == values.dim() == 4):
                return False
            self._kept.append((keys[:1, :, : self.length].clone(), values[:1, :, : self.length].clone()))
        return all(part.shape[2] == self.length for both in self._kept for part in both)

    def inputs(self, rows: int) -> dict[str, Any]:
        """Arguments of a forward of so many prompts."""
        cache = DynamicCache(config=self._config)
        for block, (keys, values) in enumerate(self._kept):
            cache.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1), block)
        return {self._argument: cache, "use_cache": True}


def same_states(states: Mapping[int, Tensor], others: Mapping[int, Tensor]) -> bool:
    """Whether hidden states ``[n, D]`` of each site are the same but for rounding."""
    if states.keys() != others.keys():
        return False
    for site, one in states.items():
        other = others[site]
        tolerance = max(_ROUNDING, _ROUNDING_UNITS * torch.finfo(one.dtype).eps)
        # Not `>`: NaN is not the same.
        if not ((one.float() - other.float()).norm(dim=-1) <= tolerance * one.float().norm(dim=-1)).all():
            return False
    return True
