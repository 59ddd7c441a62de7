"""Faults at calls that change files: the short form of ``python tests/faults``, and that it finds what is planted."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "faults"))

import disk
import operations
import points
import shim

pytestmark = pytest.mark.skipif(shim.missing() is not None, reason=str(shim.missing()))


@pytest.fixture(scope="module", autouse=True)
def _built():
    shim.build()


@pytest.fixture(scope="module")
def known(tmp_path_factory) -> dict[str, operations.Operation]:
    place = operations.Place(tmp_path_factory.mktemp("place"))
    return {operation.name: operation for operation in place.operations()}


@pytest.mark.parametrize(("name", "limit"), [("directions, over an old file", 2), ("anchors, 1 rank", 1)])
def test_old_or_new_and_the_next_run_as_if_nothing_had_happened(known, tmp_path, name, limit):
    bench = points.Bench(known[name], tmp_path / "bench")
    bench.prepare()
    for kind in points.FAULTS:
        for point in bench.points(kind, limit):
            found = bench.run(point)
            assert not found.bad, found


def in_place() -> int:
    Path("out.json").write_text("new" * 100)
    return 0


def not_synced() -> int:
    Path("partial").write_text("new" * 100)
    Path("partial").replace("out.json")
    return 0


@pytest.mark.parametrize(
    ("run", "kind", "expected"),
    [
        (in_place, "kill", {"loss"}),
        (in_place, "half", {"mixture"}),
        (in_place, "full", {"traceback", "loss"}),
        (not_synced, "power", {"loss", "mixture"}),
    ],
)
def test_planted_defects_are_found(tmp_path, run, kind, expected):
    planted = operations.Operation(
        "planted", run, run, before=lambda: Path("out.json").write_text("old" * 100), single="out.json"
    )
    bench = points.Bench(planted, tmp_path / "bench")
    bench.prepare()
    found = [bench.run(point) for point in bench.points(kind, 100)]
    kinds = ("mixture", "loss", "differs", "leftover", "traceback")
    assert {name for point in found for name in kinds if getattr(point, name)} == expected


def test_what_was_synced_survives_and_no_more(tmp_path):
    before, after = tmp_path / "before", tmp_path / "after"
    before.mkdir()
    (before / "old").write_bytes(b"old")
    calls = [
        disk.Call("o", 0, "new", "", 0, 1),
        disk.Call("w", 0, "new", "", 0, 0, b"synced"),
        disk.Call("s", 0, "new", "", 0, 0),
        disk.Call("s", 0, "", "", 0, 0),
        disk.Call("w", 0, "new", "", 6, 0, b"more"),
        disk.Call("r", 0, "old", "moved", 0, 0),
    ]
    found = disk.Disk(before)
    for call in calls:
        found.apply(call)
    survived = {}
    for state in ("all", *disk.STATES):
        found.write(after / state if after.exists() else (after.mkdir() or after / state), state)
        survived[state] = {file.name: file.read_bytes() for file in (after / state).iterdir()}
    moved = {"new": b"synced", "moved": b"old"}
    assert survived == {
        "all": {"new": b"syncedmore", "moved": b"old"},
        "nothing": {"new": b"synced", "old": b"old"},
        "names": moved,
        "torn": {"new": b"syncedmo", "moved": b"old"},
        "last name": moved,
    }


def test_record_is_of_enough_points_and_none_is_bad():
    rows = json.loads((Path(__file__).parents[1] / "faults" / "recorded.json").read_text())["rows"]
    assert sum(row["points"] for row in rows) >= 300
    bad = ("mixtures", "losses", "resumes that differ", "leftovers", "tracebacks")
    assert [row for row in rows if any(row[name] for name in bad)] == []
