"""Batches that fit in memory: a size to begin with, and half as many whenever memory runs out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import nn

from procon.errors import ProConError
from procon.models.decoder import model_device

logger = logging.getLogger(__name__)

#: Where ``"auto"`` begins. On a CPU larger batches are no faster.
_AUTO, _AUTO_ON_CPU = 128, 32

_Item = TypeVar("_Item")


def first_batch_size(given: int | str, model: nn.Module) -> int:
    """How many prompts are first tried at once: ``given``, or for ``"auto"`` what suits the model's device."""
    if given == "auto":
        return _AUTO_ON_CPU if model_device(model).type == "cpu" else _AUTO
    return int(given)


def in_batches(items: Sequence[_Item], batch_size: int, run: Callable[[Sequence[_Item]], None]) -> None:
    """Call ``run`` on the items, ``batch_size`` of them at a time.

    When memory runs out, a warning says so, and half as many are tried from there on. ``run`` must have no effect if it
    fails.

    Raises:
        ProConError: if a single item does not fit.
    """
    begun = 0
    while begun < len(items):
        batch = items[begun : begun + batch_size]
        # Beyond the except clause, as its error holds what the failed batch had in memory.
        if _fits(batch, run):
            begun += len(batch)
            continue
        clear_device_cache(garbage_collection=True)
        if len(batch) == 1:
            raise ProConError(
                "memory ran out with one prompt at a time: load the model in fewer bits (load_in_4bit), or spread it "
                "over more devices (device_map)"
            )
        batch_size = len(batch) // 2
        logger.warning("memory ran out with %d prompts at once: going on with %d", len(batch), batch_size)


def _fits(batch: Sequence[_Item], run: Callable[[Sequence[_Item]], None]) -> bool:
    try:
        run(batch)
    except RuntimeError as error:
        if not (should_reduce_batch_size(error) or "out of memory" in str(error)):  # it knows not every device's words
            raise
        return False
    return True
