"""Damaged files are refused or mended: the short form of ``python tests/flips``, and that it finds what is planted."""

import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "flips"))

import campaign
import damage

from procon.anchors import shards

RECORD = Path(__file__).parents[1] / "flips" / "recorded.json"


def test_no_damage_goes_unnoticed():
    rows = campaign.run(2, 2, show=lambda text: None)
    assert {row["file"] for row in rows} >= {"anchors file", "anchors manifest", "directions", "files of another model"}
    assert campaign.failures(rows) == []
    assert all(row["tried"] for row in rows)


def test_planted_defects_are_found(monkeypatch):
    """Anchors that are read without a look at their checksums, and directions whose checksum is always the same."""

    def read(self, key):
        for entry in self._same_tokens(key):
            file, start = self._files[entry["file"]], int(entry["start"])
            return np.fromfile(file, "<f4", entry["length"] * self._columns, offset=start).reshape(-1, self._columns)
        return None

    monkeypatch.setattr(shards.AnchorShards, "read", read)
    monkeypatch.setattr("procon.directions.directions._checksum", lambda tensors, about: "the same")
    shown = []
    bad = campaign.failures(campaign.run(2, 2, show=shown.append))
    found = {
        (row["file"], row["damage"], name) for row in bad for name in (damage.WRONG, damage.TRACEBACK) if row[name]
    }
    assert ("anchors file", "bit of projections", damage.WRONG) in found
    assert any(text.startswith("SILENTLY WRONG: anchors file, opened, bit of projections: bit ") for text in shown)


def test_the_record_is_whole():
    recorded = json.loads(RECORD.read_text())
    assert recorded["command"] == "python tests/flips"
    assert sum(row["tried"] for row in recorded["rows"]) >= 5000
    assert campaign.failures(recorded["rows"]) == []
