"""How long a call takes: on the host's clock, or on the GPU's."""

import time
from collections.abc import Callable

import torch

_FIRST_SLEEP = 1 << 21  # cycles: about a millisecond
_LONGEST_SLEEP = 1 << 28


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def wall_time(call: Callable[[], object], calls: int) -> float:
    """Seconds per call on the host's clock, the GPU's work included."""
    _synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    _synchronize()
    return (time.perf_counter() - start) / calls


def gpu_time(call: Callable[[], object], calls: int) -> float:
    """Seconds per call on the GPU alone.

    The GPU sleeps while the host queues all calls, so that it never waits for a launch, as in a training step whose
    kernels are large. A call that itself waits for the GPU cannot be queued; its time includes the launches.
    """
    sleep = _FIRST_SLEEP
    while True:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        torch.cuda._sleep(sleep)
        start.record()
        for _ in range(calls):
            call()
        queued_in_time = not start.query()
        end.record()
        end.synchronize()
        if queued_in_time or sleep >= _LONGEST_SLEEP:
            return start.elapsed_time(end) / 1e3 / calls
        sleep *= 2
