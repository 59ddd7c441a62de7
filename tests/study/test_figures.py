"""The study's plots, and the sweeps that they show."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from made_up_runs import PLAIN, RANDOM, STRENGTH, STRENGTHS, R, constrained, write_strengths

from benchmarks.study.figures import pareto_front, plot_front, plot_kept, plot_sweeps, spread
from benchmarks.study.intervals import Estimate
from benchmarks.study.methods import Method
from benchmarks.study.sweep import find_sweeps


def test_sweeps_are_methods_of_one_recipe():
    in_gap = [
        replace(method, name=f"gap_{method.name}", config={**method.config, "procon_units": "gap"}) for method in R
    ]
    warm = Method("wu", "wu", "procon_s", config={"procon_schedule": "procon_wu:2@20steps"})
    alone = constrained("alone", 0.1, procon_blocks="-1")
    sweeps = find_sweeps([PLAIN, warm, alone, *R, *RANDOM, *in_gap])
    assert [sweep.title_among(sweeps) for sweep in sweeps] == ["", "units gap"]
    assert sweeps[0].methods["refusal"] == {alpha: [f"r_{alpha}"] for alpha in STRENGTHS}
    assert sweeps[0].methods["random"][0.1] == ["random_0.1_1", "random_0.1_2"]
    assert set(sweeps[1].methods) == {"refusal"}


def test_sweep_plot_has_means_over_draws(write, load):
    write_strengths(write, [0.25, 0.75, 1.0], [0.25, 0.25, 0.75])
    write("arithmetic", RANDOM[2], 9, 0.5, split="validation")
    outcomes = load()
    runs = {method.name: outcomes.of(STRENGTH, "arithmetic", method.name) for method in (*R, *RANDOM)}
    refusal, task, exchange = plot_sweeps(find_sweeps(STRENGTH.methods), runs, {}).axes
    lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in refusal.get_lines()}
    assert lines == {
        "refusal direction": ([0.01, 0.1, 1.0], [0.25, 0.75, 1.0]),
        "random directions": ([0.01, 0.1, 1.0], [0.25, (0.5 + 0.25) / 2, 0.75]),
    }
    assert refusal.get_xscale() == "log"
    assert {tuple(line.get_ydata()) for line in task.get_lines()} == {(0.5, 0.5, 0.5)}
    first, _ = exchange.get_lines()
    assert (list(first.get_xdata()), list(first.get_ydata())) == ([0.5, 0.5, 0.5], [0.25, 0.75, 1.0])


def test_pareto_front_by_definition():
    points = [(0.1, 0.9), (0.5, 0.5), (0.4, 0.5), (0.5, 0.4), (0.9, 0.1), (0.05, 0.9), (0.5, 0.5)]
    front = pareto_front(points)
    assert front == [(0.1, 0.9), (0.5, 0.5), (0.9, 0.1)]
    for x, y in set(points) - set(front):
        assert any(a >= x and b >= y for a, b in front)


def test_front_plot_has_a_marker_and_whiskers_per_method():
    rng = np.random.default_rng(4)
    points = {name: (Estimate.of(rng.random((3, 8)).round()), Estimate.of(rng.random((3, 8)).round())) for name in "ab"}
    (axes,) = plot_front(points).axes
    for container, (task, refusal) in zip(axes.containers, points.values(), strict=True):
        marker, _, (across, along) = container.lines
        assert (marker.get_xdata()[0], marker.get_ydata()[0]) == (task.mean, refusal.mean)
        assert [end[0] for end in across.get_segments()[0]] == pytest.approx(task.rate_interval)
        assert [end[1] for end in along.get_segments()[0]] == pytest.approx(refusal.rate_interval)
    assert [text.get_text() for text in axes.texts] == sorted(points, key=lambda name: points[name][1].mean)
    assert {text.xy for text in axes.texts} == {(task.mean, refusal.mean) for task, refusal in points.values()}


def test_a_row_per_method_has_both_rates():
    rng = np.random.default_rng(5)
    points = {name: (Estimate.of(rng.random((3, 8)).round()), Estimate.of(rng.random((3, 8)).round())) for name in "ab"}
    (axes,) = plot_kept(points).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]
    for container, place in zip(axes.containers, (1, 0), strict=True):
        marker, _, (across,) = container.lines
        rates = [rates[place] for rates in points.values()]
        assert list(marker.get_xdata()) == [rate.mean for rate in rates]
        for segment, rate in zip(across.get_segments(), rates, strict=True):
            assert [end[0] for end in segment] == pytest.approx(rate.rate_interval)


@pytest.mark.parametrize("places", [[], [0.5], [0.0, 0.0, 0.0], [0.99, 1.0, 1.0], [0.1, 0.12, 0.5, 0.9]])
def test_labels_are_spread(places):
    found = spread(places, 0.1)
    assert all(later - earlier > 0.1 - 1e-9 for earlier, later in pairwise(found))
    assert all(-1e-9 < place < 1 + 1e-9 for place in found)
    if places == [0.5]:
        assert found == places
