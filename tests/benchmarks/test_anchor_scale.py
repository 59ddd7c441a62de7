"""What anchors cost at any size: sums done by hand, the store in a small size, and the page from its records."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.anchor_scale import arithmetic, simulation
from benchmarks.anchor_scale.advice import Plan, advise, cost_table
from benchmarks.anchor_scale.arithmetic import MODELS, Model, Ranks
from benchmarks.anchor_scale.page import write_page
from benchmarks.anchor_scale.records import SIMULATION, Line, Measured, naive_ratios, read_ratios
from benchmarks.anchor_scale.synthetic import FINGERPRINT, Job
from benchmarks.anchor_scale.wording import in_bytes, in_percent, in_powers, in_seconds
from procon.anchors import shards
from procon.anchors.shards import AnchorShards, ShardWriter
from procon.sequences import split_batch

ROOT = Path(__file__).parents[2]

#: Of 3 blocks of width 4, by hand: 2 attention projections of 4 x 4 and two of 4 x 2, three of 4 x 10, two norms.
TINY = Model.llama(
    "tiny",
    {
        "hidden_size": 4,
        "intermediate_size": 10,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 7,
        "tie_word_embeddings": True,
    },
)


def test_recorded_bytes():
    assert arithmetic.recorded_bytes(100_000 * 200, 32) == 2_560_000_000  # the example of docs/cost.md
    assert arithmetic.recorded_bytes(10, 3, sequences=2, directions=2) == 4 * 10 * 3 * 2 + 2 * 32
    # 4 x 30 bytes for each of 200 tokens, and 32: 24,032 bytes for 200 tokens.
    assert arithmetic.tokens_within(24_032 * 5, 30, 200) == 1000


def test_ranks():
    one_host, apart, together = Ranks(8, shared=False), Ranks(20, shared=False), Ranks(20)
    assert [ranks.hosts for ranks in (one_host, apart, together)] == [1, 3, 3]
    assert [arithmetic.copies(ranks) for ranks in (one_host, apart, together)] == [1, 3, 1]
    assert [arithmetic.exchanged_bytes(100, ranks) for ranks in (one_host, apart, together)] == [0, 1900, 0]
    assert [arithmetic.exchange_seconds(100, ranks, 50) for ranks in (one_host, apart, together)] == [0, 2, 0]
    assert arithmetic.index_bytes(1000, Ranks(4)) == 4 * 48_000
    assert arithmetic.index_bytes(1000, Ranks(512)) == 8 * 48_000


def test_models():
    assert TINY.decoder == 3 * (2 * 16 + 2 * 8 + 3 * 40 + 2 * 4) + 4 == 532
    assert TINY.parameters == 532 + 28
    assert replace(TINY, tied=False).parameters == 532 + 2 * 28
    assert TINY.adapter(1) == 3 * (8 + 6 + 6 + 8)
    # As their publishers count them.
    assert [model.parameters for model in MODELS] == [134_515_008, 8_030_261_248, 70_553_706_496]


def test_shares_of_time():
    # A forward with the head is 560 multiplications per token; a step is two of them under LoRA, or three.
    assert arithmetic.forward_share(TINY, "lora") == 532 / 1120
    assert arithmetic.forward_share(TINY, "full") == 532 / 1680
    assert arithmetic.recording_share(0.4, 4) == pytest.approx(0.1)
    assert arithmetic.probe_share(8, 40, 2, 1600) == pytest.approx(0.1)
    # Per probe: three token ids and a length, three projections, and a state of width 4.
    assert arithmetic.probe_bytes(2, 3, TINY) == 2 * (8 * 4 + 4 * 3 + 4 * 4)
    assert arithmetic.copied_bytes(560, 2) == 1120


def test_a_line_through_two_lengths():
    line = Line.through((100, 2.0), (300, 3.0))
    assert line == (1.5, 0.005)
    assert line.at(500) == 4.0
    assert Line.through((100, 2.0), (300, 1.0)) == (2.0, 0.0)  # noise is no negative time


def test_words():
    assert [in_bytes(value) for value in (0, 999, 1000, 2_560_000_000, 9.999e11)] == [
        "0",
        "999 B",
        "1 kB",
        "2.56 GB",
        "1 TB",
    ]
    assert [in_seconds(value) for value in (0, 2.5e-5, 0.02, 90, 7200, 864_000)] == [
        "0",
        "25 µs",
        "20 ms",
        "1.5 min",
        "2 h",
        "10 days",
    ]
    assert [in_percent(value) for value in (0, 1e-6, 0.0049, 0.395)] == ["0%", "< 0.01%", "0.49%", "40%"]
    assert in_powers(8.3e9) == "8.3 &times; 10<sup>9</sup>"


@pytest.fixture
def job(tmp_path) -> Job:
    return Job(tmp_path / "store", 300, tokens=5, sites=4)


def test_sequences_are_those_that_a_batch_is_split_into(job):
    numbers = [7, 0, 299]
    for made, split in zip(job.make(numbers), split_batch(job.batch(numbers)), strict=True):
        assert made.key() == split.key()
    assert len({sequence.key() for sequence in job.make(range(300))}) == 300
    assert np.array_equal(job.rows([0, 7])[1], job.rows([7])[0])
    assert job.rows([7]).shape == (1, 5, 4)


def test_the_arithmetic_is_of_the_files_and_the_index_of_the_library(job):
    assert shards._ENTRY.itemsize + 8 == arithmetic.INDEX_BYTES_IN_MEMORY
    found = simulation.write(job)
    (file,) = job.folder.glob("*.safetensors")
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    # One more offset than sequences in each file.
    assert found["bytes"] == header + 8 + arithmetic.recorded_bytes(300 * 5, 4, sequences=300)


def test_the_store_in_a_small_size(job, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 5000)
    monkeypatch.setattr(simulation, "CHUNK", 64)
    monkeypatch.setattr(simulation, "LONG", {"tokens": 50, "sequences": 20})
    monkeypatch.setattr(simulation, "LOOKED_UP", 40)
    # An interrupted writing: what is there is not written again, and the rest is.
    job.folder.mkdir()
    writer = ShardWriter(job.folder, FINGERPRINT)
    for sequence, rows in zip(job.make(range(70)), job.rows(range(70)), strict=True):
        writer.add(sequence.key(), rows)
    there = len(AnchorShards(job.folder, FINGERPRINT, 4))
    assert 0 < there < 70

    ran = []

    def run(stage, *arguments):
        ran.append(stage.__name__)
        # What starts processes is slow; the exchange is tried in tests/anchors/test_exchange.py.
        if stage is simulation.exchange:
            return {"bytes": 100, "seconds": 1.0, "cpu_seconds": 0.5}
        return stage(arguments[0], 0) if stage is simulation.load else stage(*arguments)

    found = simulation.simulate(job, run)
    assert found["write"]["sequences"] == 300 - there
    assert found["write"]["projection_bytes"] == 300 * 5 * 4 * 4
    assert len(AnchorShards(job.folder, FINGERPRINT, 4)) == 300
    measured = Measured.of(found)
    assert measured.warm.at(80) > 0
    assert measured.exchange_bytes_per_second == 200
    once = len(ran)
    assert simulation.simulate(job, run) == found
    assert len(ran) == once  # no stage twice
    with pytest.raises(SystemExit, match="other anchors"):
        simulation.write(replace(job, sites=3))


def test_ratios_of_result_files():
    def benchmark(group, contender, baseline):
        ratio = {"median": 0.4, "low": 0.3, "high": 0.5}
        info = {
            "contender": contender,
            "baseline": baseline,
            "ratios": {baseline: ratio} if contender != baseline else {},
        }
        name = "benchmarks/bench_anchors.py::test_recording[x]"
        return {"group": group, "fullname": name, "extra_info": info, "stats": {"rounds": 5}}

    result = {
        "datetime": "2026-01-02T03:04",
        "machine_info": {"procon": {"device": "a processor", "threads": 2}},
        "benchmarks": [
            benchmark("anchors of an epoch tiny 2x2", "plain", "plain"),
            benchmark("anchors of an epoch tiny 2x2", "record", "plain"),
            benchmark("anchors of a batch tiny 2x2", "annotate", "unverified"),
        ],
    }
    found = read_ratios([result])
    assert list(found) == ["record"]
    assert found["record"][:3] == (0.4, 0.3, 0.5)
    assert found["record"].source == "`bench_anchors.py`, tiny 2x2, 5 pairs, 2026-01-02, a processor, threads: 2"


def test_ratios_of_the_cost_page():
    found = naive_ratios((ROOT / "docs" / "cost.md").read_text(encoding="utf-8"))
    assert list(found) == ["LoRA, fp32", "LoRA, bf16", "full, fp32", "full, bf16"]
    assert all(1 < ratio.low <= ratio.median <= ratio.high for ratio in found.values())
    with pytest.raises(ValueError, match=r"docs/cost\.md has no table"):
        naive_ratios("")


def test_the_page_is_what_the_records_make(tmp_path):
    """If not: ``python -m benchmarks.anchor_scale page``."""
    (tmp_path / "cost.md").write_bytes((ROOT / "docs" / "cost.md").read_bytes())
    page, plot = write_page(tmp_path)
    assert page.read_bytes() == (ROOT / "docs" / "scale.md").read_bytes()
    # Other versions of matplotlib draw it otherwise.
    for file in (plot, ROOT / "docs" / "assets" / "anchor-bytes.svg"):
        assert all(f"recorded, {model.name.rpartition('-')[2]}" in file.read_text(encoding="utf-8") for model in MODELS)


@pytest.mark.parametrize(
    ("changes", "source"),
    [
        ({"known": False}, "live"),
        ({"known": False, "training": "full"}, "live"),
        ({"known": False, "training": "full", "sharded": True}, "probes"),
        ({"passes": 1}, "live"),
        ({"passes": 1, "training": "full"}, "recorded"),
        ({"passes": 2}, "recorded"),
        ({"passes": 2, "free_bytes": 1e9}, "live"),
        ({"passes": 2, "free_bytes": 1e9, "training": "full"}, "live"),
        ({"passes": 2, "free_bytes": 1e9, "training": "full", "sharded": True}, "probes"),
        ({"passes": 2, "training": "full", "sharded": True}, "recorded"),
    ],
)
def test_advice(changes, source):
    plan = Plan(MODELS[1], tokens=10**8, ranks=Ranks(16), **changes)
    assert advise(plan)[0] == source


def test_costs_of_a_job():
    plan = Plan(MODELS[1], tokens=10**9, ranks=Ranks(16, shared=False), training="full", passes=2)
    measured = Measured.of(json.loads(SIMULATION.read_text(encoding="utf-8")))
    rows = {row[0]: row[1:] for row in cost_table(plan, measured).rows}
    assert rows["disk, all file systems"][:2] == ["256 GB", "0"]
    assert rows["received by all ranks"] == ["1.92 TB", "0", "0"]
    assert rows["memory per host for the index"] == ["1.92 GB", "0", "0"]
    assert rows["memory per rank for copied weights, bf16"] == ["0", "16.1 GB", "0"]
    assert rows["time over plain training"] == ["16%", "31%", "3.9%"]
    refused = cost_table(replace(plan, sharded=True), measured).rows
    assert ["memory per rank for copied weights, bf16", "0", "refused", "0"] in refused
