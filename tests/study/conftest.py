"""Run files that are written and loaded as the study does it."""

import sys
from pathlib import Path

import pytest

from benchmarks.study.methods import Method
from benchmarks.study.outcomes import Outcomes
from benchmarks.study.record import Cell
from procon.files import save_json

# The tests of this folder share made_up_runs.py; pytest's import mode leaves their folder out of the path.
sys.path.append(str(Path(__file__).parent))

from made_up_runs import BUDGET, Echo, make_run, pattern


@pytest.fixture
def write(tmp_path):
    """Writes a run file where the study would."""

    def write(job: str, method: Method, seed: int, refused, split="held_out", **more) -> Path:
        cell = Cell(job, method.name, seed, split)
        outcomes = pattern(refused, seed) if isinstance(refused, float) else refused
        return save_json(make_run(cell, method, outcomes, **more), cell.path(tmp_path / "runs"))

    return write


@pytest.fixture
def load(tmp_path):
    return lambda: Outcomes.load(BUDGET, tmp_path / "runs", Echo())
