"""The study's intervals, tests, tables, figures and pages, from run files made up here."""

import json
import math
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from benchmarks.study import report
from benchmarks.study.figures import pareto_front, plot_front, plot_sweeps
from benchmarks.study.hypotheses import CONTROL, LOG_ODDS, REFUSAL, Hypothesis, at_chosen_strength, judge
from benchmarks.study.intervals import Estimate, p_value
from benchmarks.study.methods import Method
from benchmarks.study.outcomes import Outcomes, judges_agree, values
from benchmarks.study.paper import PAPER
from benchmarks.study.plan import Budget, Part, Size
from benchmarks.study.preset import candidates, choose, confirm
from benchmarks.study.record import Cell
from benchmarks.study.sweep import find_sweeps
from benchmarks.study.table import NONE, NOT_RUN, Table, cost_table, kept_table, preset_table
from procon.errors import ProConError
from procon.files import save_json

PROMPTS = 8


def constrained(name: str, alpha: float, directions: str = "refusal", **config) -> Method:
    return Method(
        name, name, "procon_s", config={"procon_schedule": f"procon_s:{alpha}", **config}, directions=directions
    )


START = Method("start", "start", length=0)
PLAIN = Method("plain", "IFT")
SAFE = Method("safe", "IFT_safe", "safe", safety=True)
STRENGTHS = (0.01, 0.1, 1.0)
R = [constrained(f"r_{alpha}", alpha) for alpha in STRENGTHS]
RANDOM = [constrained(f"random_{alpha}_{draw}", alpha, f"random:{draw}") for alpha in STRENGTHS for draw in (1, 2)]
THIRD_DRAW = constrained("random_0.1_3", 0.1, "random:3")

TABLE = Part("table", "What is kept", "What does it keep?", (START, PLAIN, SAFE), ("arithmetic", "poisoned"))
STRENGTH = Part("strength", "By strength", "How much?", (PLAIN, *R, *RANDOM), seeds=(9,), split="validation")
CONFIRMED = Part("control", "The control", "Any direction?", (R[1], *RANDOM[2:4], THIRD_DRAW))
BUDGET = Budget((TABLE, STRENGTH, CONFIRMED), Size())


def pattern(share: float, shift: int = 0) -> list[bool]:
    """``PROMPTS`` outcomes of which ``share`` are true, beginning at prompt ``shift``."""
    return [(i - shift) % PROMPTS < round(share * PROMPTS) for i in range(PROMPTS)]


def make_run(cell: Cell, method: Method, refused: list[bool], *, task: float = 0.5, seconds=100.0) -> dict:
    """A run file; log-odds are 1 where refused, else -1, and a little more for each prompt."""
    malicious = [
        {"reply": f"{'no' if r else 'yes'} {i}", "refused": r, "degenerate": i == 0, "log_odds": 2.0 * r - 1 + i / 100}
        for i, r in enumerate(refused)
    ]
    benign = [{"reply": "fine", "refused": False, "degenerate": False} for _ in range(PROMPTS)]
    tasks = [{"reply": "1", "refused": False, "degenerate": False, "correct": c} for c in pattern(task)]
    trained = {"train_seconds": seconds, "peak_memory_mb": 2048} if method.length else {"train_seconds": 0.0}
    return {
        "setting": cell.job,
        "method": json.loads(json.dumps(asdict(method))),
        "seed": cell.seed,
        "made": {
            "date": f"2026-01-0{1 + cell.seed % 3}T00:00:00+00:00",
            "machine": "box",
            "python": "3.11.7",
            "torch": "2.13.0",
            "transformers": "5.24.0",
            "peft": "0.21.2",
            "commit": "abc",
        },
        **trained,
        "split": cell.split,
        "hidden_size": 16,
        "replies": {"malicious": malicious, "benign": benign, "task": tasks},
        "perplexity": 12.5,
        "drift": {"cosine": [None, 0.9, 0.5], "malicious_shift": [None, -1.0, -0.5]},
        "displacement": {
            name: [None, 0.2, 0.4] for name in ("along", "off", "direction_share", "principal_share", "massive_share")
        },
        "seconds": 2 * seconds,
    }


class Echo:
    """A second judge that reads the made-up replies; it misses the last prompt's refusals."""

    def refuses(self, replies):
        return [reply.startswith("no") and not reply.endswith(f" {PROMPTS - 1}") for reply in replies]


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


# Statistics


def test_standard_error_is_that_of_crossed_random_effects():
    """Mean squares by their definition, summed in loops."""
    y = np.random.default_rng(0).normal(size=(3, 5)) + np.arange(5) + 2 * np.arange(3)[:, None]
    mean = sum(y[s, p] for s in range(3) for p in range(5)) / 15
    row = [sum(y[s]) / 5 for s in range(3)]
    column = [sum(y[:, p]) / 3 for p in range(5)]
    of_seeds = sum(5 * (value - mean) ** 2 for value in row) / 2
    of_prompts = sum(3 * (value - mean) ** 2 for value in column) / 4
    of_rest = sum((y[s, p] - row[s] - column[p] + mean) ** 2 for s in range(3) for p in range(5)) / 8
    assert of_seeds > of_rest
    assert of_prompts > of_rest
    square = of_seeds + of_prompts - of_rest

    found = Estimate.of(y)
    assert found.mean == pytest.approx(mean)
    assert found.error**2 == pytest.approx(square / 15)
    assert found.freedom == pytest.approx(square**2 / (of_seeds**2 / 2 + of_prompts**2 / 4 + of_rest**2 / 8))
    half = stats.t.ppf(0.975, found.freedom) * found.error
    assert found.interval == pytest.approx((mean - half, mean + half))
    assert p_value(y) == pytest.approx(1 - stats.t.cdf(mean / found.error, found.freedom))
    assert p_value(-y) == pytest.approx(1 - p_value(y))


def test_one_seed_is_the_usual_test_over_prompts():
    y = np.random.default_rng(1).normal(0.3, 1, size=(1, 20))
    assert p_value(y) == pytest.approx(stats.ttest_1samp(y[0], 0, alternative="greater").pvalue)
    assert Estimate.of(y).interval == pytest.approx(tuple(stats.t.interval(0.95, 19, y.mean(), stats.sem(y[0]))))


def test_repeating_the_same_outcomes_under_more_seeds_adds_nothing():
    y = np.random.default_rng(2).normal(size=(1, 20))
    assert Estimate.of(np.repeat(y, 3, 0)).error == pytest.approx(Estimate.of(y).error)


@pytest.mark.parametrize("seed_effect", [0.0, 0.2])
def test_level_and_coverage(seed_effect):
    """A true null hypothesis is rejected as often as the module says, and the intervals hold the mean as often.

    Three standard errors of 1000 draws beside its 6% and 93%. A test over prompts alone, the seeds taken as given, is
    far from it as soon as the seeds differ.
    """
    rng = np.random.default_rng(3)
    rejected, alone, covered = [], [], []
    for _ in range(1000):
        y = rng.normal(0, seed_effect, (3, 1)) + rng.normal(0, 0.35, (1, 64)) + rng.normal(0, 0.4, (3, 64))
        found = Estimate.of(y)
        rejected.append(p_value(y) < 0.05)
        alone.append(p_value(y.mean(0, keepdims=True)) < 0.05)
        covered.append(found.interval[0] <= 0 <= found.interval[1])
    assert np.mean(rejected) < 0.06 + 3 * math.sqrt(0.06 * 0.94 / 1000)
    assert np.mean(covered) > 0.93 - 3 * math.sqrt(0.93 * 0.07 / 1000)
    assert (np.mean(alone) > 0.15) == (seed_effect > 0)


def test_no_spread():
    assert p_value(np.zeros((3, 8))) == 1
    assert p_value(np.ones((3, 8))) == 0
    # Wilson's bound at as many outcomes as prompts, with Student's quantile.
    square = stats.t.ppf(0.975, 7) ** 2
    assert Estimate.of(np.ones((3, 8))).rate_interval == pytest.approx((1 / (1 + square / 8), 1.0))
    assert Estimate.of(np.zeros((3, 8))).rate_interval == pytest.approx((0.0, square / (8 + square)))


def test_rate_interval_is_wilsons_at_the_sample_size_of_the_error():
    y = np.array([pattern(0.75, seed) for seed in range(3)], float)
    found = Estimate.of(y)
    low, high = found.rate_interval
    t = stats.t.ppf(0.975, found.freedom)
    n = 0.75 * 0.25 / found.error**2
    # Its ends are the shares from which 0.75 is t standard errors away.
    for end in (low, high):
        assert abs(0.75 - end) == pytest.approx(t * math.sqrt(end * (1 - end) / n))
    assert 0 < low < 0.75 < high < 1


# Runs


def test_outcomes_are_seeds_by_prompts(write, load):
    write("arithmetic", PLAIN, 1, 0.25)
    write("arithmetic", PLAIN, 0, 0.5)
    outcomes = load()
    runs = outcomes.find("arithmetic", "plain")
    assert list(runs) == [0, 1]
    assert values(runs, REFUSAL).tolist() == [pattern(0.5, 0), pattern(0.25, 1)]
    assert values(runs, LOG_ODDS)[0, :2].tolist() == [1.0, 1.01]
    assert outcomes.find("poisoned", "plain") == {}
    assert outcomes.find("arithmetic", "plain", split="validation") == {}
    assert list(outcomes.find("arithmetic", "plain", seeds=(1, 2))) == [1]


def test_a_run_of_other_settings_is_no_evidence(write, load):
    path = write("arithmetic", PLAIN, 0, 0.5)
    run = json.loads(path.read_text())
    run["method"]["label"] = "a new name is no other method"
    path.write_text(json.dumps(run))
    assert len(load().runs) == 1
    run["method"]["length"] = 2.0
    path.write_text(json.dumps(run))
    with pytest.raises(ProConError, match=r"seed-0\.json' was made with length 2\.0, but the plan has 1\.0: delete"):
        load()


def test_no_runs(load):
    with pytest.raises(ProConError, match="there are no runs in"):
        load()


def test_judges_agree(write, load):
    """Cohen's kappa, its formula written out: the second judge misses one of four refusals among 16 replies."""
    write("arithmetic", PLAIN, 0, [False] * 4 + [True] * 4)
    replies, kappa = judges_agree(load())
    agree, chance = 15 / 16, 4 / 16 * 3 / 16 + 12 / 16 * 13 / 16
    assert replies == 16
    assert kappa == pytest.approx((agree - chance) / (1 - chance))


# Hypotheses


def test_pairs_prompts_and_seeds(write, load):
    better, worse = [1.0, 0.875, 1.0], [0.125, 0.25, 0.0]
    for seed in range(3):
        write("arithmetic", SAFE, seed, better[seed])
        write("arithmetic", PLAIN, seed, worse[seed])
    hypothesis = Hypothesis("safe keeps more", ("safe",), ("plain",))
    found = judge(hypothesis, REFUSAL, load())
    differences = np.array(
        [
            np.subtract(pattern(b, s), pattern(w, s), dtype=float)
            for s, (b, w) in enumerate(zip(better, worse, strict=True))
        ]
    )
    assert found.seeds == (0, 1, 2)
    assert found.by_seed == (0.875, 0.625, 1.0)
    assert found.p == p_value(differences)
    assert found.difference == Estimate.of(differences)
    assert str(found) == "held"
    other_way = judge(Hypothesis("plain keeps more", ("plain",), ("safe",)), REFUSAL, load())
    assert other_way.p == pytest.approx(1 - found.p)
    assert str(other_way) == "failed"


def test_seeds_that_one_side_lacks_are_left_out(write, load):
    write("arithmetic", SAFE, 0, 0.5)
    write("arithmetic", SAFE, 1, 1.0)
    write("arithmetic", PLAIN, 1, 0.25)
    hypothesis = Hypothesis("safe keeps more", ("safe",), ("plain",))
    assert judge(hypothesis, REFUSAL, load()).seeds == (1,)
    assert judge(replace(hypothesis, job="poisoned"), REFUSAL, load()).p is None
    assert str(judge(replace(hypothesis, job="poisoned"), REFUSAL, load())) == "not run"


def test_one_run_of_what_is_not_trained_serves_every_seed(write, load):
    write("arithmetic", START, 0, 1.0)
    for seed in range(3):
        write("arithmetic", PLAIN, seed, 0.5)
    found = judge(Hypothesis("plain loses", ("start",), ("plain",)), REFUSAL, load())
    assert found.seeds == (0, 1, 2)
    assert found.by_seed == (0.5, 0.5, 0.5)


def write_strengths(write, r: list[float], random: list[float]) -> None:
    for method, share in zip(R, r, strict=True):
        write("arithmetic", method, 9, share, split="validation")
    for number, method in enumerate(RANDOM):
        write("arithmetic", method, 9, random[number // 2], split="validation")


def test_strength_is_chosen_on_validation_prompts(write, load):
    """Where r and the random draws differ most there, whatever the held-out prompts say."""
    write_strengths(write, [0.25, 0.75, 1.0], [0.25, 0.25, 0.75])
    write("arithmetic", R[1], 0, 0.5)
    for method in (*RANDOM[2:4], THIRD_DRAW):
        write("arithmetic", method, 0, 0.625)
    chosen = at_chosen_strength(BUDGET.parts, load())
    assert chosen.better == ("r_0.1",)
    assert chosen.worse == ("random_0.1_1", "random_0.1_2", "random_0.1_3")
    assert chosen.claim == f"{CONTROL.claim}: alpha 0.1"
    verdict = judge(chosen, REFUSAL, load())
    assert verdict.by_seed == (-0.125,)
    assert str(verdict) == "failed"


def test_of_equal_strengths_the_weakest(write, load):
    write_strengths(write, [0.25, 0.75, 1.0], [0.25, 0.5, 0.75])
    assert at_chosen_strength(BUDGET.parts, load()).better == ("r_0.1",)


def test_without_validation_runs_the_control_is_not_run(write, load):
    write("arithmetic", R[1], 0, 0.5)
    write("arithmetic", RANDOM[2], 0, 0.5)
    chosen = at_chosen_strength(BUDGET.parts, load())
    assert chosen == CONTROL
    assert str(judge(chosen, REFUSAL, load())) == "not run"


# Sweeps


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


# The default settings

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


def test_of_settings_within_the_bars_the_one_that_keeps_most_is_chosen(write, load_choice):
    # The first keeps too little, and the last learns too little.
    write_choice(write, [0.75, 1.0, 1.0], [0.625, 0.5, 0.375])
    among = candidates([CHOICE, REPORTED], load_choice())
    assert [(found.kept, found.task) for found in among] == [(0.75, 0.125), (1.0, 0.0), (1.0, -0.125)]
    assert [found.within for found in among] == [False, True, False]
    assert choose(among).method == R[1]


def test_nothing_is_chosen_where_nothing_is_within_the_bars(write, load_choice):
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
    assert (found.job, found.kept, found.task, found.within) == ("arithmetic", 0.75, -0.125, False)
    *_, last = preset_table(among, choose(among), [found]).rows
    assert last == ["**r_0.1**", "held-out, benign: arithmetic word problems", "75%", "-12", "no"]


# Tables and figures


def rows(table: Table) -> dict[str, dict[str, str]]:
    """Cells by method and column; a second column of one name gets a quote mark."""
    header: list[str] = []
    for name in table.header:
        header.append(name + "'" if name in header else name)
    return {row[0]: dict(zip(header, row, strict=True)) for row in table.rows}


def test_what_was_not_run_shows_no_number_of_ours(write, load):
    write("arithmetic", PLAIN, 0, 0.5)
    for table in (kept_table, cost_table):
        cells = rows(table(TABLE, "arithmetic", load()))["IFT_safe"]
        ours = [cell for name, cell in cells.items() if name != "method" and not name.startswith("paper")]
        assert ours == [NOT_RUN] + [NONE] * (len(ours) - 1)


def test_kept_table(write, load):
    for seed in range(3):
        write("arithmetic", PLAIN, seed, 0.5, task=0.75)
    cells = rows(kept_table(TABLE, "arithmetic", load()))["IFT"]
    assert cells["refuses malicious"].startswith("50%<br>")
    # Seeds 0 to 2 refuse prompts 0 to 3, 1 to 4 and 2 to 5: none is the last, which the second judge misses.
    assert cells["second judge"] == cells["refuses malicious"]
    assert cells["log-odds"].startswith("0.0<br>")
    assert cells["refuses benign"].startswith("0%<br>0 to ")
    assert cells["degenerate"] == f"{100 / 16:.0f}%"
    assert cells["task"].startswith("75%<br>")
    assert cells["paper"] == f"{100 - 61.18:.0f}%"
    assert cells["paper'"] == "66%"


def test_the_paper_stands_beside_held_out_runs_alone(write, load):
    write("arithmetic", PLAIN, 9, 0.5, split="validation")
    assert "paper" not in kept_table(STRENGTH, "arithmetic", load()).header
    assert "paper" in kept_table(TABLE, "arithmetic", load()).header
    assert "paper" not in kept_table(CONFIRMED, "arithmetic", load()).header


def test_cost_table(write, load):
    write("arithmetic", START, 0, 1.0)
    write("arithmetic", PLAIN, 0, 0.5, seconds=100.0)
    write("arithmetic", PLAIN, 1, 0.5, seconds=300.4)
    write("arithmetic", SAFE, 0, 0.5, seconds=150.0)
    write("arithmetic", SAFE, 1, 0.5, seconds=150.3)
    cells = rows(cost_table(TABLE, "arithmetic", load()))
    assert cells["IFT"]["time"] == "100 to 300 s"
    assert cells["IFT_safe"]["time"] == "150 s"
    assert cells["IFT_safe"]["seeds"] == "2 of 3"
    assert cells["start"]["time"] == cells["start"]["memory"] == cells["start"]["seeds"] == NONE
    assert (
        cells["IFT"]
        | {
            "perplexity": "12.5",
            "cosine": "0.700",
            "shift": "-0.75",
            "off r": "0.30",
            "share along r": "30.0%",
            "memory": "2.00 GB",
        }
        == cells["IFT"]
    )


def test_paper_has_its_tables():
    """Spot checks against arXiv 2509.06795, Tables I, III, IV and V."""
    assert PAPER["arithmetic"]["procon_wu_safe"].refusal == pytest.approx(87.12)
    assert PAPER["arithmetic"]["last_block"].table == "Table V"
    assert PAPER["poisoned"]["plain"].asr == 67.06
    assert PAPER["extraction"]["procon_wu_safe"].task == 32.0


def test_pareto_front_by_definition():
    points = [(0.1, 0.9), (0.5, 0.5), (0.4, 0.5), (0.5, 0.4), (0.9, 0.1), (0.05, 0.9), (0.5, 0.5)]
    front = pareto_front(points)
    assert front == [(0.1, 0.9), (0.5, 0.5), (0.9, 0.1)]
    for x, y in set(points) - set(front):
        assert any(a >= x and b >= y for a, b in front)


def test_front_plot_has_a_marker_and_whiskers_a_method():
    rng = np.random.default_rng(4)
    points = {name: (Estimate.of(rng.random((3, 8)).round()), Estimate.of(rng.random((3, 8)).round())) for name in "ab"}
    (axes,) = plot_front(points).axes
    for container, (task, refusal) in zip(axes.containers, points.values(), strict=True):
        marker, _, (across, along) = container.lines
        assert (marker.get_xdata()[0], marker.get_ydata()[0]) == (task.mean, refusal.mean)
        assert [end[0] for end in across.get_segments()[0]] == pytest.approx(task.rate_interval)
        assert [end[1] for end in along.get_segments()[0]] == pytest.approx(refusal.rate_interval)


# Pages


@pytest.fixture
def pages(write, load, tmp_path, monkeypatch) -> Path:
    """The report of a study that is half done."""
    monkeypatch.setattr(report, "DISCUSSION", tmp_path / "discussion.md")
    write("arithmetic", START, 0, 1.0)
    for seed in range(3):
        write("arithmetic", PLAIN, seed, 0.5)
        write("arithmetic", SAFE, seed, 0.75, task=0.25)
    write_strengths(write, [0.25, 0.75, 1.0], [0.25, 0.25, 0.75])
    stale = tmp_path / "docs" / report.FIGURES / "stale.svg"
    stale.parent.mkdir(parents=True)
    stale.write_text("<svg/>")
    report.write_report(BUDGET, "table", load(), tmp_path / "docs", "by an echo")
    return tmp_path / "docs"


def test_page_has_each_part_that_was_run(pages):
    text = (pages / "results.md").read_text()
    assert "## What is kept\n" in text
    assert "## By strength\n" in text
    assert "Measured on the validation prompts" in text
    assert "## The control\n" not in text
    assert "### Arithmetic with 3% compliant answers" not in text
    assert (
        f"Of the {len(BUDGET.cells())} runs that the budget `table` plans, 16 are there, made from 2026-01-01" in text
    )
    assert "box (16 runs)" in text
    assert "judged by an echo" in text
    # 16 runs of 100 s of training, but for the start, each 200 s in all.
    assert f"Hours: {16 * 200 / 3600:.1f}, of which {15 * 100 / 3600:.1f} were training" in text


def test_page_has_the_verdicts(pages):
    text = (pages / "results.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("| plain fine-tuning loses refusals |")]
    assert len(lines) == 2
    assert all(line.endswith("| **held** |") for line in lines)
    assert "+50<br>" in lines[0]
    assert re.search(r"\| the refusal direction keeps more .*: alpha 0\.1 \| refusals \| .* \| not run \|", text)


def test_every_figure_is_a_file_and_nothing_else(pages):
    shown = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", (pages / "results.md").read_text())
    there = sorted(str(path.relative_to(pages)) for path in (pages / report.FIGURES).iterdir())
    assert sorted(shown) == there
    assert [Path(name).stem for name in there] == [
        "strength-arithmetic-strength",
        "table-arithmetic-drift",
        "table-arithmetic-front",
        "where-drift-lies",
    ]
    for name in there:
        svg = (pages / name).read_text()
        assert ElementTree.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg"
        assert "#010203" not in svg
        assert "#040506" not in svg
        assert len(svg) < 100_000


def test_html_needs_nothing_from_elsewhere(pages):
    html = (pages / "report.html").read_text()
    assert html.count("<svg") == 4
    assert "<img" not in html
    assert "<script" not in html
    assert html.count("<table") == 5
    assert "<td" in html
    assert re.findall(r'(?:href|src)="(?!#)([^"]+)"', html) == ["report.html", "https://arxiv.org/abs/2509.06795"]
    identifiers = re.findall(r'\bid="([^"]+)"', html)
    assert len(identifiers) == len(set(identifiers))


def test_two_reports_are_equal(pages, load, tmp_path):
    report.write_report(BUDGET, "table", load(), tmp_path / "again", "by an echo")
    for path in pages.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "again" / path.relative_to(pages)).read_bytes()


def test_discussion_stands_in_the_page_as_it_is(pages, load):
    text = "## What it means\n\nSomething *else*, at 5 < 6.\n"
    assert "## What it means" not in (pages / "results.md").read_text()
    report.DISCUSSION.write_text(text)
    written, _ = report.compose(BUDGET, "table", load(), "by an echo")
    assert written.index(text.strip()) < written.index("## What this does not show")


def test_a_table_is_of_its_parts_split_alone(write, load):
    write("arithmetic", PLAIN, 0, 0.5)
    before = kept_table(TABLE, "arithmetic", load()), cost_table(TABLE, "arithmetic", load())
    write("arithmetic", PLAIN, 9, 1.0, split="validation", seconds=7.0)
    assert (kept_table(TABLE, "arithmetic", load()), cost_table(TABLE, "arithmetic", load())) == before


def test_command(pages, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "load_judge", lambda endpoint, model: Echo())
    monkeypatch.setitem(report.BUDGETS, "table", BUDGET)
    assert report.main(["--runs", str(tmp_path / "runs"), "--output", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "out" / name) for name in ("results.md", "report.html")]
    assert report.main(["--runs", str(tmp_path / "empty"), "--output", str(tmp_path / "out")]) == 2
    assert "there are no runs in" in capsys.readouterr().err
    assert report.main(["--budget", "tabel"]) == 2
    assert "budget is 'tabel': choose one of" in capsys.readouterr().err
