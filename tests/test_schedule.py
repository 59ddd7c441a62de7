"""Alpha over training: the grammar, its errors, and the step at which each phase ends."""

import math
import re

import pytest

from procon.errors import ProConError
from procon.schedule import AlphaSchedule, Phase

PER_EPOCH = 10


@pytest.mark.parametrize(
    ("text", "phases", "extra"),
    [
        ("procon_s", [(0.2, None, "ep")], 0),
        ("procon_s:0.2", [(0.2, None, "ep")], 0),
        (" procon_s:2e-1 ", [(0.2, None, "ep")], 0),
        ("procon_wu", [(1, 4, "ep"), (0, None, "ep")], 1),
        ("procon_wu:2", [(2, 4, "ep"), (0, None, "ep")], 1),
        ("procon_wu:2@16ep", [(2, 16, "ep"), (0, None, "ep")], 1),
        ("procon_wu:0.5@30steps", [(0.5, 30, "steps"), (0, None, "ep")], 1),
        ("0", [(0, None, "ep")], 0),
        ("0.3@0.5ep", [(0.3, 0.5, "ep")], 0),
        ("1@2ep, 0.1@200steps ,0", [(1, 2, "ep"), (0.1, 200, "steps"), (0, None, "ep")], 0),
    ],
)
def test_grammar(text, phases, extra):
    schedule = AlphaSchedule.parse(text)
    assert schedule == AlphaSchedule(tuple(Phase(*phase) for phase in phases), extra=extra)
    assert AlphaSchedule.parse(str(schedule)) == schedule


@pytest.mark.parametrize(
    "text",
    [
        "0.123456789012@1234567steps,1e-07",
        "1@1000000steps,0",
        "procon_wu:1@0.333333333ep",
        "procon_wu:1@1e-07ep",
        "0.30000000000000004",
    ],
)
def test_text_of_a_schedule_gives_it_back(text):
    assert str(AlphaSchedule.parse(text)) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not understood"),
        ("procon", "not understood"),
        ("procon_s:", "not understood"),
        ("procon_wu:", "not understood"),
        ("procon_wu:@4ep", "not understood"),
        ("1@4", "not understood"),
        ("1@4epochs", "not understood"),
        ("1@-4ep", "not understood"),
        ("1@1.2.3ep", "not understood"),
        ("1@2ep,,0", "not understood"),
        ("one", "not understood"),
        ("procon_s:0.1@2ep", "has a length"),
        ("-0.1", "alpha is -0.1: give a finite number, 0 or more"),
        ("procon_s:-1", "alpha is -1"),
        ("procon_wu:1@2ep,0", "not understood"),
        ("nan", "alpha is nan"),
        ("inf@2ep,0", "alpha is inf"),
        ("procon_s:1e-40", "too small for float32"),
        ("procon_wu:0@4ep", "would train longer and constrain nothing"),
        ("procon_wu:0", "would train longer and constrain nothing"),
        ("1@1e300ep,0", "positive length"),
        ("1@0ep,0", "positive length"),
        ("procon_wu:1@0steps", "positive length"),
        ("1@2.5steps,0", "whole number"),
        ("1,0.5", "only the last phase"),
        ("hold:0.2", "schedule 'hold:0.2' is not understood"),
    ],
)
def test_what_is_no_schedule(text, message):
    with pytest.raises(ProConError, match=message) as caught:
        AlphaSchedule.parse(text)
    assert "\n" not in str(caught.value)


def test_the_message_shows_schedules_that_are_some():
    with pytest.raises(ProConError) as caught:
        AlphaSchedule.parse("?")
    text, *examples = re.findall("'([^']+)'", str(caught.value).replace("ALPHA", "0.5"))
    assert text == "?"
    assert len(examples) == 4
    for example in examples:
        AlphaSchedule.parse(example)


@pytest.mark.parametrize(
    ("phases", "extra"), [((), 0), ((Phase(1.0), Phase(0.0)), 0), ((Phase(1.0),), 1), ((Phase(1.0, 2), Phase(0.0)), 2)]
)
def test_impossible_phases(phases, extra):
    with pytest.raises(ProConError):
        AlphaSchedule(phases, extra)
    with pytest.raises(ProConError, match="positive"):
        Phase(1.0, math.inf)


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("procon_s", 0),
        ("1@2ep,0", 0),
        ("procon_wu", 40),
        ("procon_wu:1@16ep", 160),
        ("procon_wu:1@7steps", 7),
        ("procon_wu:1@0.25ep", 3),  # a part of a step is a step
        ("procon_wu:1@0.7ep", 7),  # 0.7 * 10 is 7.000000000000001
        ("procon_wu:1@0.0000001ep", 1),  # a phase has a step at least
    ],
)
def test_warm_up_comes_on_top(text, steps):
    assert AlphaSchedule.parse(text).extra_steps(PER_EPOCH) == steps


def test_alpha_at_boundaries():
    schedule = AlphaSchedule.parse("1@2ep,0.5@7steps,0.25@0.15ep,0")
    alphas = [schedule.alpha(step, PER_EPOCH) for step in range(40)]
    assert alphas == [1] * 20 + [0.5] * 7 + [0.25] * 2 + [0] * 11


def test_the_last_phase_goes_on():
    assert AlphaSchedule.parse("1@1ep,0.5@1ep").alpha(10**6, PER_EPOCH) == 0.5
    assert AlphaSchedule.parse("1@1ep,0.5@1ep,0.25@1ep").alpha(10**6, PER_EPOCH) == 0.25
    assert AlphaSchedule.parse("procon_s").alpha(10**9, PER_EPOCH) == 0.2


@pytest.mark.parametrize(("text", "active"), [("0", False), ("0@2ep,0", False), ("procon_wu", True), ("0@2ep,1", True)])
def test_active(text, active):
    assert AlphaSchedule.parse(text).active is active


@pytest.mark.parametrize(
    ("text", "steps", "constrained"),
    [
        ("procon_s", 15, 15),
        ("0", 15, 0),
        ("0@1000steps,5", 15, 0),
        ("0@2ep,5", 20, 0),
        ("0@2ep,5", 21, 1),
        ("1@2ep,0", 15, 15),
        ("1@2ep,0", 50, 20),
        ("1@0.0000001ep,0", 15, 1),
        ("0@5steps,1@5steps,0@5steps,1", 18, 8),
        ("1@1ep,0.5@1ep", 50, 50),
    ],
)
def test_constrained_steps_are_those_with_an_alpha(text, steps, constrained):
    schedule = AlphaSchedule.parse(text)
    assert schedule.constrained_steps(steps, PER_EPOCH) == constrained
    assert sum(schedule.alpha(step, PER_EPOCH) > 0 for step in range(steps)) == constrained
