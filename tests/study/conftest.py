"""Run files that are written and loaded as the study does it."""

import sys
from pathlib import Path

import pytest

# The tests of this folder share made_up_runs.py; pytest's import mode leaves their folder out of the path.
sys.path.append(str(Path(__file__).parent))

from made_up_runs import load_runs, writer


@pytest.fixture
def write(tmp_path):
    """Writes a run file where the study would."""
    return writer(tmp_path / "runs")


@pytest.fixture
def load(tmp_path):
    return lambda: load_runs(tmp_path / "runs")
