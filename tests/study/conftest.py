"""Runs that are written and loaded as the study does it."""

import sys
from pathlib import Path

import pytest

# The tests of this folder share made_up_runs.py; pytest's import mode leaves their folder out of the path.
sys.path.append(str(Path(__file__).parent))

from made_up_runs import load_runs, writer

from benchmarks.study.start import Start, contrast_means
from procon.chat import builtin_prompts
from procon.directions import Directions
from procon.models import load_model


@pytest.fixture
def write(tmp_path):
    """Makes a run."""
    return writer(tmp_path / "runs.jsonl.xz")


@pytest.fixture
def load(tmp_path):
    return lambda: load_runs(tmp_path / "runs.jsonl.xz")


@pytest.fixture
def tiny_start(tiny_model, tokenizer, tmp_path) -> Start:
    """A tiny model that refuses nothing, and directions that separate nothing: enough to train."""
    for part in (tiny_model(), tokenizer):
        part.save_pretrained(tmp_path / "start")
    model, own = load_model(tmp_path / "start")
    prompts = builtin_prompts("extraction").first(2)
    states = model(**own(["one two"] * 4, return_tensors="pt"), output_hidden_states=True).hidden_states[:3]
    states = states[0].new_tensor([[layer[row, -1].tolist() for layer in states] for row in range(4)])
    states[:2] += 1
    directions = Directions.from_means(contrast_means(states))
    return Start(tmp_path / "start", own, directions, directions, prompts, states, [7], "")
