"""Faults in what writes files: a few points of ``python tests/faults``, and that it finds what is planted."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "faults"))

import campaign
import operations

from procon.anchors import shards

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, and counts on how Linux names what is synced")

KNOWN = {operation.name: operation for operation in operations.OPERATIONS}


@pytest.mark.parametrize(
    ("name", "faults"), [("JSON, over an old file", ("kill", "power", "full")), ("anchors", ("kill", "flip", "cut"))]
)
def test_nothing_wrong_comes_of_a_fault(tmp_path, name, faults):
    bench = campaign.Bench(KNOWN[name], tmp_path / "bench")
    for fault in faults:
        row = bench.row(fault, 3)
        assert row["points"] == 3
        assert not any(row[outcome] for outcome in campaign.BAD)


def in_place() -> None:
    Path("out.json").write_text("new" * 100)


def not_synced() -> None:
    Path("partial").write_text("new" * 100)
    Path("partial").replace("out.json")


@pytest.mark.parametrize(
    ("run", "fault", "expected"),
    [
        (in_place, "full", campaign.TRACEBACK),
        (in_place, "power", campaign.WRONG),
        (not_synced, "power", campaign.WRONG),
        (not_synced, "flip", campaign.WRONG),
    ],
)
def test_planted_defects_are_found(tmp_path, run, fault, expected):
    planted = operations.Operation(
        "planted",
        run,
        lambda: Path("out.json").read_text(),
        "out.json",
        before=lambda: Path("out.json").write_text("old" * 100),
    )
    assert campaign.Bench(planted, tmp_path / "bench").row(fault, 3)[expected]


def test_anchors_that_are_read_without_their_checksums_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "xxh3_64_intdigest", lambda rows, seed: 0)
    bench = campaign.Bench(KNOWN["anchors"], tmp_path / "bench")
    assert bench.row("flip", 12)[campaign.WRONG]


def test_the_record_is_of_enough_points_and_none_is_bad():
    rows = json.loads((Path(__file__).parents[1] / "faults" / "recorded.json").read_text())["rows"]
    assert sum(row["points"] for row in rows) >= 80
    assert [row for row in rows if any(row[outcome] for outcome in campaign.BAD)] == []
