"""The graphics card that stands for each architecture, with figures that were published.

A100 80 GB SXM and H100 SXM: NVIDIA's data sheets and white papers. B200: 8 TB/s as announced; clock, multiprocessors
and caches as public lists of specifications have them. The L2 cache's bytes per clock are those of the A100's white
paper, taken for the later ones as well.
"""

from typing import NamedTuple


class Card(NamedTuple):
    name: str
    capability: int
    multiprocessors: int
    hertz: float  # boost clock
    bandwidth: float  # of its memory, bytes per second
    l2_cache_bytes: int
    shared_bytes_per_block: int  # the most that a block may ask for

    @property
    def l2_bandwidth(self) -> float:
        return 5120 * self.hertz


CARDS = {
    "sm_80": Card("NVIDIA A100-SXM4-80GB", 80, 108, 1.41e9, 2.039e12, 40 * 2**20, 163 * 1024),
    "sm_90": Card("NVIDIA H100 80GB HBM3", 90, 132, 1.98e9, 3.35e12, 50 * 2**20, 227 * 1024),
    "sm_100": Card("NVIDIA B200", 100, 148, 1.98e9, 8.0e12, 126 * 2**20, 227 * 1024),
}
