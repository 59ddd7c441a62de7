"""The tables of the page: from the measured figures, by the arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from benchmarks.anchor_scale.arithmetic import (
    INDEX_BYTES_IN_MEMORY,
    MODELS,
    PROBE_BATCH,
    PROBE_EVERY,
    PROBE_TOKENS,
    Model,
    Ranks,
    copied_bytes,
    copies,
    exchange_seconds,
    exchanged_bytes,
    forward_share,
    index_bytes,
    probe_share,
    recorded_bytes,
    recording_share,
    tokens_within,
)
from benchmarks.anchor_scale.records import Measured, Ratio
from benchmarks.anchor_scale.wording import digits, in_bytes, in_percent, in_powers, in_seconds, power
from benchmarks.study.table import Table

TOKENS = tuple(10**exponent for exponent in range(5, 11))
RANKS = (1, 8, 64, 512)

#: Constrained tokens of a sequence, wherever the page does not say otherwise; and those of a step of one rank.
TOKENS_PER_SEQUENCE, STEP_TOKENS = 200, 4096

#: The model of the tables by ranks.
MIDDLE = MODELS[1]

_TRAININGS = {"lora": "LoRA", "full": "all weights"}


def stored(tokens: int, model: Model = MIDDLE) -> int:
    """Bytes of the anchors of a data set on one disk."""
    return recorded_bytes(tokens, model.blocks, tokens // TOKENS_PER_SEQUENCE)


def disk_table() -> Table:
    """By tokens and models."""
    header = ["training tokens", *(f"{model.name}, {model.blocks} sites" for model in MODELS)]
    return Table(header, [[power(n), *(in_bytes(stored(n, model)) for model in MODELS)] for n in TOKENS])


def size_table() -> Table:
    """What size alone says."""
    advice = {
        10**7: "`recorded`: the disk is never a question",
        10**8: "`recorded`",
        10**9: "`recorded` if all hosts see one file system or have the disk, and data are passed more than once",
        10**10: "`live` or `probes`; or `recorded` with fewer blocks or tokens, on a shared file system",
    }
    rows = [
        [
            f"up to {power(tokens)}" if tokens == min(advice) else power(tokens),
            in_bytes(stored(tokens)),
            in_bytes(index_bytes(tokens // TOKENS_PER_SEQUENCE, Ranks(1))),
            text,
        ]
        for tokens, text in advice.items()
    ]
    return Table(["training tokens", f"disk, {MIDDLE.name}", "index in memory, per rank", "by size alone"], rows)


def by_ranks(cell: Callable[[int, int], str], ranks: Sequence[int] = RANKS) -> Table:
    """By tokens and ranks."""
    header = ["training tokens", *(f"{count} rank{'s' if count > 1 else ''}" for count in ranks)]
    return Table(header, [[power(n), *(cell(n, count) for count in ranks)] for n in TOKENS])


def copies_table() -> Table:
    """Disk of all hosts together, if each has its own."""

    def cell(tokens: int, count: int) -> str:
        return in_bytes(stored(tokens) * copies(Ranks(count, shared=False)))

    return by_ranks(cell)


def network_table(measured: Measured) -> Table:
    """What is sent if hosts share no file system, and how long it takes."""

    def cell(tokens: int, count: int) -> str:
        ranks, size = Ranks(count, shared=False), stored(tokens)
        received = exchanged_bytes(size, ranks)
        if not received:
            return "0"
        return (
            f"{in_bytes(received)}<br>{in_seconds(exchange_seconds(size, ranks, measured.exchange_bytes_per_second))}"
        )

    return by_ranks(cell)


def writing_table(measured: Measured) -> Table:
    """Work of the recording beside the forward, per rank."""
    size = recorded_bytes(TOKENS_PER_SEQUENCE, MIDDLE.blocks)

    def cell(tokens: int, count: int) -> str:
        return in_seconds(tokens / TOKENS_PER_SEQUENCE / count * measured.write.at(size))

    return by_ranks(cell)


def opening_table(measured: Measured) -> Table:
    """What does not become less with more ranks."""
    size = recorded_bytes(TOKENS_PER_SEQUENCE, MIDDLE.blocks)
    rows = []
    for tokens in TOKENS:
        sequences = tokens // TOKENS_PER_SEQUENCE
        rows.append(
            [
                power(tokens),
                f"{sequences:,}",
                in_bytes(index_bytes(sequences, Ranks(1))),
                in_bytes(index_bytes(sequences, Ranks(8))),
                in_seconds(sequences * measured.open_per_sequence),
                in_seconds(sequences * measured.verify.at(size)),
            ]
        )
    header = ["training tokens", "sequences", "index per rank", "index per host of 8 ranks", "opening", "verifying"]
    return Table(header, rows)


def lookup_table(measured: Measured) -> Table:
    """Look-ups of sequences of several lengths, and of a step."""
    rows = []
    for tokens in (8, TOKENS_PER_SEQUENCE, 512, 2048):
        size = recorded_bytes(tokens, MIDDLE.blocks)
        per_step = STEP_TOKENS / tokens
        rows.append(
            [
                f"{tokens:,}",
                in_bytes(size),
                *(in_seconds(line.at(size)) for line in (measured.warm, measured.cold)),
                *(in_seconds(per_step * line.at(size)) for line in (measured.warm, measured.cold)),
            ]
        )
    header = ["tokens per sequence", "anchors", "look-up, cached", "from the disk", "per step, cached", "from the disk"]
    return Table(header, rows)


def time_table() -> Table:
    """Time of each source over that of plain training."""
    passes = (1, 2, 3, 10)
    header = ["", "`live`", *(f"{n} pass{'es' if n > 1 else ''}" for n in passes), "`probes`"]
    probes = in_percent(probe_share(PROBE_BATCH, PROBE_TOKENS, PROBE_EVERY, STEP_TOKENS))
    rows = []
    for training, name in _TRAININGS.items():
        for model in MODELS:
            forward = forward_share(model, training)
            shares = [in_percent(share) for share in (forward, *(recording_share(forward, n) for n in passes))]
            rows.append([f"{model.name}, {name}", *shares, probes])
    return Table(header, rows)


def check_table(ratios: dict[str, Ratio], naive: dict[str, Ratio]) -> Table:
    """Arithmetic beside measured ratios."""
    small = MODELS[0]
    lora, full = forward_share(small, "lora"), forward_share(small, "full")
    probes = PROBE_BATCH * PROBE_TOKENS / STEP_TOKENS
    texts = {
        "record": ("recording, over a plain epoch", lora),
        "recorded": ("a step with recorded anchors, over plain", 1.0),
        "live": ("a step with live anchors, over plain", 1 + lora),
        "probes": ("a step that runs the probes, over plain", 1 + probes),
        "default": ("a step with recorded anchors that runs the probes too, over plain", 1 + probes),
        "dpo_live": ("live anchors within DPO, over DPO", 1.0),
    }
    rows = [
        [text, f"{expected:.3f}", str(ratios[name]), ratios[name].source]
        for name, (text, expected) in texts.items()
        if name in ratios
    ]
    for name, ratio in naive.items():
        expected = 1 + (lora if name.startswith("LoRA") else full)
        rows.append(
            [f"a second forward in eager code, {name}, over plain", f"{expected:.3f}", str(ratio), ratio.source]
        )
    return Table(["SmolLM2-135M", "arithmetic", "measured, median [95%]", "from"], rows)


def copy_table() -> Table:
    """Memory of live anchors per rank."""
    header = ["", "a fresh adapter", "an adapter trained before, fp32", "all weights, bf16", "all weights, fp32"]
    return Table(
        header,
        [
            [
                model.name,
                "0",
                in_bytes(copied_bytes(model.adapter(), 4)),
                in_bytes(copied_bytes(model.parameters, 2)),
                in_bytes(copied_bytes(model.parameters, 4)),
            ]
            for model in MODELS
        ],
    )


def probe_table() -> Table:
    """Share of the probes by the tokens of a step."""
    steps = (1024, STEP_TOKENS, 32_768, 262_144)
    shares = (probe_share(PROBE_BATCH, PROBE_TOKENS, PROBE_EVERY, step) for step in steps)
    return Table(["tokens per rank and step", *(f"{step:,}" for step in steps)], [["time", *map(in_percent, shares)]])


def crossing_table() -> Table:
    """Where one source begins to cost more than another, or than what a job has anyway."""

    def per_model(text: str, cell: Callable[[Model], str]) -> list[str]:
        return [text, *map(cell, MODELS)]

    def tokens(capacity: Callable[[Model], float]) -> Callable[[Model], str]:
        return lambda model: in_powers(tokens_within(capacity(model), model.blocks, TOKENS_PER_SEQUENCE))

    rows = [
        per_model(
            "tokens from which anchors take more disk than the weights in bf16", tokens(lambda m: 2 * m.parameters)
        ),
        per_model("tokens that fill 1 TB", tokens(lambda _: 1e12)),
        per_model("tokens that fill 10 TB", tokens(lambda _: 1e13)),
        per_model(
            "tokens from which the index takes 1 GB per rank",
            lambda _: in_powers(1e9 / INDEX_BYTES_IN_MEMORY * TOKENS_PER_SEQUENCE),
        ),
        per_model(
            "tokens per rank and step from which probes cost less than live anchors, LoRA",
            lambda m: digits(PROBE_BATCH * PROBE_TOKENS / PROBE_EVERY / forward_share(m, "lora"), 2),
        ),
    ]
    return Table(["", *(model.name for model in MODELS)], rows)
