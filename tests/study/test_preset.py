"""The choice of the default settings: by two criteria on validation prompts, and confirmed on held-out ones."""

from dataclasses import replace

import pytest
from made_up_runs import PLAIN, START, Echo, R

from benchmarks.study.outcomes import Outcomes
from benchmarks.study.plan import Budget, Part, Size
from benchmarks.study.preset import candidates, choose, confirm
from benchmarks.study.table import preset_table

CHOICE = Part("choice", "Choice", "Which?", (START, PLAIN, *R), seeds=(9,), split="validation")
REPORTED = Part("reported", "Reported", "Does it hold?", (START, PLAIN, R[1]), ("arithmetic", "poisoned"), seeds=(0, 1))


def write_choice(write, refused, tasks):
    """The part CHOICE, with a start that refuses all, and plain fine-tuning that learns half."""
    write("arithmetic", START, 9, 1.0, split="validation", task=0.0)
    write("arithmetic", PLAIN, 9, 0.0, split="validation", task=0.5)
    for method, share, task in zip(R, refused, tasks, strict=True):
        write("arithmetic", method, 9, share, split="validation", task=task)


@pytest.fixture
def load_choice(tmp_path):
    return lambda: Outcomes.load(Budget((CHOICE, REPORTED), Size()), tmp_path / "runs", Echo())


def test_of_settings_that_meet_both_criteria_the_one_that_keeps_most_is_chosen(write, load_choice):
    # The first keeps too little, and the last learns too little.
    write_choice(write, [0.75, 1.0, 1.0], [0.625, 0.5, 0.375])
    among = candidates([CHOICE, REPORTED], load_choice())
    assert [(found.kept, found.task) for found in among] == [(0.75, 0.125), (1.0, 0.0), (1.0, -0.125)]
    assert [found.meets_both for found in among] == [False, True, False]
    assert choose(among).method == R[1]


def test_nothing_is_chosen_if_nothing_meets_both_criteria(write, load_choice):
    write_choice(write, [0.75, 0.75, 1.0], [0.5, 0.5, 0.375])
    assert choose(candidates([CHOICE, REPORTED], load_choice())) is None


def test_the_choice_is_confirmed_where_it_was_run_beside_start_and_plain(write, load_choice):
    write_choice(write, [0.0, 1.0, 0.0], [0.5, 0.5, 0.5])
    for job in ("arithmetic", "poisoned"):
        write(job, START, 0, 1.0)
        write(job, R[1], 0, 0.875)
        write(job, R[1], 1, 0.625)
    write("arithmetic", PLAIN, 0, 0.0, task=0.625)
    outcomes = load_choice()
    among = candidates([CHOICE, REPORTED], outcomes)
    again = replace(REPORTED, name="again")
    (found,) = confirm(choose(among), [CHOICE, REPORTED, again], outcomes)
    assert (found.job, found.kept, found.task, found.meets_both) == ("arithmetic", 0.75, -0.125, False)
    *_, last = preset_table(among, choose(among), [found]).rows
    assert last == ["**r_0.1**", "held-out, benign: arithmetic word problems", "75%", "-12", "no"]
