"""How long a launch would take at best, from what was counted. An estimate: nothing here was measured by us.

The longest of four times:

- memory: each tensor once, at the bandwidth that is published for the card;
- L2: whatever is loaded and stored, at the cache's published bandwidth, as if the L1 cache held nothing;
- instructions: one of a warp per clock and scheduler, of which a multiprocessor has four, at the boost clock;
- waiting: as many blocks as fit take turns. A turn waits :data:`WAIT` for its first bytes and then for the rest, at the
  multiprocessor's share of the bandwidth; if the next turn's bytes are copied meanwhile, for the longer of the two.

What is left out: the time between launches, PyTorch's own kernels, and what the last blocks wait for each other.
"""

from typing import NamedTuple

from benchmarks.audit.contest.cards import CARDS

#: Seconds. Fitted: Liger's own timings of its Triton backward on an H100, 134.4 us at 8192 x 4096 and 95.4 us at
#: 8192 x 2048 in bfloat16 (commit 7c454f48), less 8 us for the sum of the weight's gradient, are 62 turns of
#: 0.8 us + 1.2 us and of 0.8 us + 0.6 us.
WAIT = 0.8e-6


class Estimate(NamedTuple):
    """Seconds."""

    memory: float
    l2: float
    instructions: float
    waiting: float

    @property
    def total(self) -> float:
        return max(self)

    @property
    def bound(self) -> str:
        return max(self._fields, key=lambda name: getattr(self, name))


def estimate(launch: dict, target: str, rows: int) -> Estimate:
    """Of one :class:`~benchmarks.audit.contest.counts.Counted` launch, as a dictionary."""
    card = CARDS[target]
    moved = sum(launch["loaded_bytes_per_row"].values()) + sum(launch["stored_bytes_per_row"].values())
    resident = max(1, launch["blocks_per_multiprocessor"]) * card.multiprocessors
    turns = launch["turns"] * max(1, launch["programs"] / resident)
    share = card.bandwidth / card.multiprocessors
    transfer = launch["memory_bytes"] / (launch["programs"] * launch["turns"]) / share
    turn = max(WAIT, transfer) if launch["asynchronous_bytes_in_loop"] else WAIT + transfer
    return Estimate(
        memory=launch["memory_bytes"] / card.bandwidth,
        l2=moved * rows / card.l2_bandwidth,
        instructions=launch["instructions_per_row"] * rows / (4 * card.multiprocessors * card.hertz),
        waiting=turns * turn,
    )
