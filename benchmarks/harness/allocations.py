"""The memory that tensors take at most while a call runs: counted, on CPUs as on GPUs."""

from collections.abc import Callable
from itertools import accumulate

import torch
from torch.profiler import ProfilerActivity, profile


def peak_rise(call: Callable[[], object]) -> int:
    """Bytes of tensors at the peak of ``call``, above those that are there as it begins.

    On a CPU from the profiler's record of allocations: what is resident would show what the C library keeps.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    # Sizes are below 0 where memory is freed.
    return max(0, *accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))
