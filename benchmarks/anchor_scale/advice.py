"""Which source of anchors a job should take by cost, and what each would cost it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from benchmarks.anchor_scale.arithmetic import (
    PROBE_BATCH,
    PROBE_EVERY,
    PROBE_TOKENS,
    PROBES,
    Model,
    Ranks,
    copied_bytes,
    copies,
    exchange_seconds,
    exchanged_bytes,
    forward_share,
    index_bytes,
    probe_bytes,
    probe_share,
    recorded_bytes,
    recording_share,
)
from benchmarks.anchor_scale.records import Measured
from benchmarks.anchor_scale.wording import in_bytes, in_percent, in_seconds
from benchmarks.study.table import Table


@dataclass(frozen=True)
class Plan:
    """A job.

    Attributes:
        tokens: constrained ones of the data set.
        training: of a fresh LoRA adapter, or of all weights.
        passes: over the data: epochs, of all runs from the same start.
        known: whether the tokens exist before training.
        sharded: whether parameters are sharded over the ranks (FSDP2, ZeRO-3).
        free_bytes: disk for anchors on each file system.
        per_sequence: tokens of a sequence.
        per_step: tokens of one rank in an optimiser step.
    """

    model: Model
    tokens: int
    ranks: Ranks
    training: Literal["lora", "full"] = "lora"
    passes: int = 1
    known: bool = True
    sharded: bool = False
    free_bytes: float = 1e12
    per_sequence: int = 200
    per_step: int = 4096

    @property
    def sequences(self) -> int:
        return self.tokens // self.per_sequence

    @property
    def stored(self) -> int:
        """Bytes of recorded anchors on one file system."""
        return recorded_bytes(self.tokens, self.model.blocks, self.sequences)


def advise(plan: Plan) -> tuple[str, str]:
    """The source, and why."""
    refused = plan.training == "full" and plan.sharded
    if not plan.known and refused:
        return "probes", "tokens cannot be recorded beforehand, and sharded weights cannot be copied for live anchors"
    if not plan.known:
        return "live", "tokens cannot be recorded beforehand"
    if plan.stored > plan.free_bytes:
        size = f"anchors would take {in_bytes(plan.stored)} of {in_bytes(plan.free_bytes)}"
        if refused:
            return "probes", f"{size}, and sharded weights cannot be copied for live anchors"
        return "live", size
    if plan.passes == 1 and plan.training == "lora":
        return "live", "in one pass it takes the time of the recording, and no disk"
    if plan.passes == 1:
        return "recorded", "in one pass it takes the time of live anchors, and no second set of weights"
    return "recorded", f"its forward is paid once, that of live anchors in each of {plan.passes} passes"


def cost_table(plan: Plan, measured: Measured) -> Table:
    """What each source would cost."""
    model, ranks, forward = plan.model, plan.ranks, forward_share(plan.model, plan.training)
    trainable = model.parameters if plan.training == "full" else 0
    rows_bytes = recorded_bytes(plan.per_sequence, model.blocks)
    look_up = plan.per_step / plan.per_sequence * measured.cold.at(rows_bytes)
    probe = probe_bytes(PROBES, PROBE_TOKENS, model)
    copied = "refused" if trainable and plan.sharded else in_bytes(copied_bytes(trainable, 2)) if trainable else "0"
    probes = in_percent(probe_share(PROBE_BATCH, PROBE_TOKENS, PROBE_EVERY, plan.per_step))
    exchange = in_seconds(exchange_seconds(plan.stored, ranks, measured.exchange_bytes_per_second))
    rows = [
        ["disk, all file systems", in_bytes(plan.stored * copies(ranks)), "0", in_bytes(probe)],
        ["received by all ranks", in_bytes(exchanged_bytes(plan.stored, ranks)), "0", "0"],
        ["seconds of that", exchange, "0", "0"],
        ["memory per host for the index", in_bytes(index_bytes(plan.sequences, ranks)), "0", "0"],
        ["memory per rank for copied weights, bf16", "0", copied, "0"],
        ["time over plain training", in_percent(recording_share(forward, plan.passes)), in_percent(forward), probes],
        ["look-ups per step, in the loader's workers", in_seconds(look_up), "0", "0"],
    ]
    return Table(["", "recorded", "live", "probes"], rows)
