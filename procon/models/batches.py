"""Batches that fit in memory: a size to begin with, and smaller ones whenever memory runs out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from accelerate.utils import find_executable_batch_size
from torch import nn

from procon.errors import ProConError
from procon.models.decoder import model_device

_Item = TypeVar("_Item")


def first_batch_size(given: int | str, model: nn.Module) -> int:
    """How many prompts are first tried at once: ``given``, or for ``"auto"`` what suits the model's device."""
    if given == "auto":
        return 32 if model_device(model).type == "cpu" else 128  # on a CPU larger batches are no faster
    return int(given)


def in_batches(items: Sequence[_Item], batch_size: int, run: Callable[[Sequence[_Item]], None]) -> None:
    """Call ``run`` on the items, ``batch_size`` of them at a time, and fewer from where memory has run out.

    ``run`` must have no effect if it fails.

    Raises:
        ProConError: if a single item does not fit.
    """
    done = 0

    def all_of(size: int) -> None:
        nonlocal done
        while done < len(items):
            run(items[done : done + size])
            done += size

    try:
        find_executable_batch_size(all_of, starting_batch_size=max(1, min(batch_size, len(items))))()
    except RuntimeError as error:
        if "No executable batch size found" not in str(error):
            raise
        raise ProConError(
            "memory ran out with one prompt at a time: load the model in fewer bits (load_in_4bit), or spread it over "
            "more devices (device_map)"
        ) from error
