"""The campaign of inputs that nobody means to give, in its short form; the whole is ``python tests/fuzz``."""

import json
from pathlib import Path

from forked import run_python

CAMPAIGN = Path(__file__).parents[1] / "fuzz"


def test_short_campaign_finds_nothing(tmp_path):
    run_python(CAMPAIGN, "--short", "--output", tmp_path / "found.json")
    *rows, total = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert total["inputs"] == sum(row["inputs"] for row in rows) > 100
    assert all(row["inputs"] == row["accepted"] + row["refused"] > 0 for row in rows)


def test_every_reader_of_the_library_is_in_the_campaign():
    """What reads a file or parses a setting is reached by an input, or named in ``LEFT_OUT`` with the reason."""
    run_python(CAMPAIGN, "--readers")


def test_the_recorded_campaign_is_large_and_clean():
    *rows, total = json.loads((CAMPAIGN / "recorded.json").read_text())["rows"]
    assert total["inputs"] >= 100_000
    assert all(row["inputs"] == row["accepted"] + row["refused"] for row in rows)
