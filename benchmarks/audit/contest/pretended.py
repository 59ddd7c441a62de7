"""A GPU that is not there: tensors without memory on it, and what PyTorch reports of it.

Launchers then choose tiles, warps and programs as on the real one. Nothing can be run, and nothing is.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.audit.contest.cards import CARDS


def properties(target: str) -> SimpleNamespace:
    """As ``torch.cuda.get_device_properties`` has them."""
    card = CARDS[target]
    return SimpleNamespace(
        name=card.name,
        major=card.capability // 10,
        minor=card.capability % 10,
        multi_processor_count=card.multiprocessors,
        warp_size=32,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048,
        max_threads_per_block=1024,
        shared_memory_per_block=48 * 1024,
        shared_memory_per_block_optin=card.shared_bytes_per_block,
        shared_memory_per_multiprocessor=card.shared_bytes_per_block + 1024,
        L2_cache_size=card.l2_cache_bytes,
        total_memory=80 * 2**30,
    )


@contextmanager
def reported(target: str) -> Iterator[torch.device]:
    """PyTorch reports a GPU of ``target``: this one."""
    # A device of its own for each, because launchers cache what they learn of a device.
    device = torch.device("cuda", list(CARDS).index(target))
    found = properties(target)
    replaced = {
        "get_device_properties": lambda *_, **__: found,
        "get_device_capability": lambda *_, **__: (found.major, found.minor),
        "get_device_name": lambda *_, **__: found.name,
        "current_device": lambda: device.index,
        "device_count": lambda: len(CARDS),
        "device": lambda *_: nullcontext(),
    }
    with patch.multiple(torch.cuda, **replaced):
        yield device


@contextmanager
def pretended(target: str) -> Iterator[torch.device]:
    """Factories of tensors inside give fake ones on a GPU of ``target``."""
    with reported(target) as device, FakeTensorMode(), device:
        yield device
