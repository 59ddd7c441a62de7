"""Peak memory of one piece of work, also if many follow each other in one process."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@contextmanager
def peak_memory() -> Iterator[Callable[[], int | None]]:
    """Gives a function that returns the peak since then, in MB: of the GPU if there is one, otherwise of the process.

    It returns None if the system does not report the peak.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        yield lambda: round(torch.cuda.max_memory_allocated() / 2**20)
    elif _RESET.exists():
        _RESET.write_text("5")  # sets the high-water mark to what is resident now (proc_pid_clear_refs(5))
        yield lambda: _status("VmHWM")
    else:
        yield lambda: None
    gc.collect()


def _status(name: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(name))
    return round(int(line.split()[1]) / 2**10)
