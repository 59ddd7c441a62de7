"""No way to train is silently unconstrained: the most telling scenarios run, and the record of all has none.

``python tests/unconstrained --output tests/unconstrained/recorded.json`` runs them all and records what it found.
"""

import json
from pathlib import Path

import pytest
from forked import run_python

CAMPAIGN = Path(__file__).parents[1] / "unconstrained"
OUTCOMES = {"acts", "refused", "warned", "said", "harmless", "same"}


@pytest.mark.slow
def test_the_most_telling_scenarios(tmp_path):
    pytest.importorskip("trl", reason="scenarios of the SFTTrainer")
    file = tmp_path / "short.json"
    run_python(CAMPAIGN, "--short", "--output", file)
    rows = json.loads(file.read_text())["rows"]
    assert len(rows) > 30
    assert {row["outcome"] for row in rows} <= OUTCOMES
    recorded = {(row["door"], row["scenario"]): row["outcome"] for row in record()}
    assert all(recorded[row["door"], row["scenario"]] == row["outcome"] for row in rows)


def record() -> list[dict]:
    return json.loads((CAMPAIGN / "recorded.json").read_text())["rows"]


def test_the_record_has_no_silent_one():
    rows = record()
    assert len(rows) >= 200
    assert {row["outcome"] for row in rows} <= OUTCOMES
