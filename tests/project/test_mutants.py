"""The runner of mutants: one that a test notices is killed, one that none does is shown, or stands in the list."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mutmut", reason="what changes the code: pip install -e '.[mutation]'")

RUNNER = Path(__file__).parents[1] / "mutants"

PLANTED = """
def within(number):
    if number < 0:
        raise ValueError("negative")
    return number < 3


def unwatched(number):
    return number + 1
"""

TESTS = """
import pytest
from planted import within


@pytest.mark.parametrize("number", [0, 2, 3])
def test_within(number):
    assert within(number) == (number != 3)


def test_negative():
    with pytest.raises(ValueError, match="^negative$"):
        within(-1)
"""

LISTED = """
[[survivor]]
file = "planted.py"
function = "unwatched"
before = "return number + 1"
after = "return None"
reason = "equivalent"
why = "nobody calls it"
"""


def test_planted_mutants(tmp_path):
    for name, text in {"planted.py": PLANTED, "test_planted.py": TESTS, "survivors.toml": LISTED}.items():
        (tmp_path / name).write_text(text)

    options = ["--root", ".", "--module", "planted.py", "--tests", "test_planted.py"]
    options += ["--output", "recorded.json", "--survivors", "survivors.toml"]

    def run() -> tuple[dict, list[str]]:
        subprocess.run(
            [sys.executable, str(RUNNER), *options],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(tmp_path)},
            capture_output=True,
            check=True,
        )
        record = json.loads((tmp_path / "recorded.json").read_text())
        (row,) = record["rows"]
        return row, record["survivors"]["planted.py"]

    row, survivors = run()
    assert survivors == [
        "planted.py, unwatched: return number + 1 -> return number - 1",
        "planted.py, unwatched: return number + 1 -> return number + 2",
    ]
    assert row["listed"] == "1 equivalent"
    assert row["killed"] >= 8
    assert row["mutants"] == row["tried"] == row["killed"] + row["survived"] + 1
    assert row["branch coverage"] == 1

    # What is done is not done again.
    log = tmp_path / ".mutants" / "planted.py.jsonl"
    done = log.read_text()
    assert run() == (row, survivors)
    assert log.read_text() == done


def test_what_hangs_is_ended():
    program = "import time, forked; print(forked.in_child(lambda: time.sleep(60), 0.2), forked.in_child(lambda: 7, 60))"
    result = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": str(RUNNER)},
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )
    assert result.stdout.split() == ["None", "7"]
