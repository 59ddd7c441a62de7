"""The page of results: its tables and figures, put into ``texts/results.md``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from benchmarks.study.figures import kept_drawing, scatter_drawing
from benchmarks.study.hard_hypotheses import BOTH, JOBS, STATES
from benchmarks.study.hypotheses import Hypothesis, Verdict, judge
from benchmarks.study.outcomes import (
    ALL_REFUSALS,
    COMPLIES,
    FRESH_REFUSES_ALONE,
    OVER_REFUSAL,
    REFUSAL,
    REFUSES_ALONE,
    TASK,
    Measure,
    Outcomes,
    judges_agree,
    values,
)
from benchmarks.study.prediction import prediction_drawing, predictions
from benchmarks.study.public import SETS
from benchmarks.study.sections import Gallery
from benchmarks.study.table import NONE, Table, difference_cell, measured, seeds_cell
from procon.chat import Split

TEXT = Path(__file__).parent / "texts" / "results.md"

_Runs = dict[int, dict]

#: By budget, run and set.
Counts = Mapping[str, Mapping[str, Mapping[str, Mapping[str, int]]]]


COLUMNS: dict[str, Callable[[_Runs], str]] = {
    "refuses malicious": measured(REFUSES_ALONE),
    "second set": measured(FRESH_REFUSES_ALONE),
    "refuses benign": measured(OVER_REFUSAL),
    "task": measured(TASK),
    "turns": measured(COMPLIES),
    "seeds": seeds_cell,
}

#: Of them, what every table has.
RATES = tuple(COLUMNS)[:4]


class Row(NamedTuple):
    """The runs of a method on a job, and what they are called."""

    label: str
    method: str
    job: str = "arithmetic"
    budget: str = "hard"
    split: Split = "held_out"


_of_poison = partial(Row, job="arithmetic_poisoned_10")

START, PLAIN, LONG = "starting model", "plain", "_x4"
OURS, DEFAULT = "ProCon", "begun_3_four"
WITH_STATES = "last states"
WITH_OWN, OWN = "last states and own replies", f"{STATES}_own_100"

CLEAN = (
    Row(START, "start"),
    Row("short: plain", "plain"),
    Row(f"short: {OURS}", DEFAULT),
    Row(f"short: {WITH_STATES}", STATES),
    Row("short: safety data, 100", "safe_100"),
    Row("short: ProCon_s", "procon_s"),
    Row(PLAIN, "plain_x4"),
    Row(OURS, DEFAULT + LONG),
    Row(WITH_STATES, STATES + LONG),
    Row("SBR", "sbr_10_each_x4"),
    Row("SafeGrad", "safegrad_1_x4"),
    Row("safety data, 100", "safe_100_x4"),
    Row("ProCon_s", "procon_s_x4"),
)

LONG_POISON = (
    _of_poison(PLAIN, "plain_x4"),
    _of_poison(OURS, DEFAULT + LONG),
    _of_poison(WITH_STATES, STATES + LONG),
    _of_poison(WITH_OWN, OWN + LONG),
    _of_poison("SBR", "sbr_10_each_x4"),
    _of_poison("SafeGrad", "safegrad_1_x4"),
    _of_poison("SafeGrad, own replies", "own_safegrad_1_x4"),
    _of_poison("SPARD", "spard_x4"),
    _of_poison("safety data, 100", "safe_100_x4"),
)

POISON = (
    _of_poison("short: plain", "plain"),
    _of_poison(f"short: {OURS}", DEFAULT),
    *LONG_POISON,
)


class Added(NamedTuple):
    """A part, the method that has it and the one that has not; in long training unless it says so."""

    label: str
    better: str
    worse: str
    budget: str = "hard"
    refusals: Measure = ALL_REFUSALS


ADDED = (
    Added("predictions along replies, for last states", DEFAULT + LONG, STATES + LONG),
    Added("eight at a time, for four", f"begun_3{LONG}", DEFAULT + LONG),
    Added("own replies, beside last states", OWN + LONG, STATES + LONG),
    Added("training tokens, beside last states", BOTH + LONG, STATES + LONG),
    Added("the refusal direction, beside last states", BOTH + LONG, "tokens_state_3_turns_random_x4"),
    Added("the same, at probes that keep projections alone", "probes_10_x4", "probes_10_random_x4"),
    Added("the same, tokens alone, alpha 0.1, 40 steps", "raw_0.1_refusal", "raw_0.1_random1", "table", REFUSAL),
    Added("Qwen: last states, for nothing", STATES + LONG, "plain_x4", "qwen"),
    Added("Qwen: predictions along replies, for last states", DEFAULT + LONG, STATES + LONG, "qwen"),
)

ADAPTIVE = (
    Row("after: plain", "plain_x4", "refuse_then_comply"),
    Row(f"after: {OURS}", DEFAULT + LONG, "refuse_then_comply"),
    Row(f"after: {WITH_STATES}", STATES + LONG, "refuse_then_comply"),
    Row(f"midway: {OURS}", DEFAULT + LONG, "turn_midway"),
)

_qwen = partial(Row, job="arithmetic_poisoned_10", budget="qwen")
_qwen_clean = partial(Row, budget="qwen")
_dpo = partial(Row, job="dpo", budget="preferences")
_grpo = partial(Row, job="grpo", budget="preferences")

OTHERS = (
    _qwen("Qwen: starting model", "start"),
    _qwen_clean("Qwen, clean: plain", "plain_x4"),
    _qwen_clean(f"Qwen, clean: {OURS}", DEFAULT + LONG),
    _qwen_clean(f"Qwen, clean: {WITH_STATES}", STATES + LONG),
    _qwen("Qwen, poison: plain", "plain_x4"),
    _qwen(f"Qwen, poison: {OURS}", DEFAULT + LONG),
    _qwen(f"Qwen, poison: {WITH_STATES}", STATES + LONG),
    _qwen("Qwen, poison: SafeGrad", "safegrad_1_x4"),
    Row("JSON: plain", "plain", "extraction"),
    Row(f"JSON: {OURS}", DEFAULT, "extraction"),
    Row("notices: plain", "plain", "passages"),
    Row(f"notices: {OURS}", DEFAULT, "passages"),
    Row("swapped, 4x: plain", "plain_x4", "swapped"),
    Row(f"swapped, 4x: {OURS}", DEFAULT + LONG, "swapped"),
    _dpo("DPO: plain", "plain"),
    _dpo(f"DPO: {OURS}", DEFAULT),
    _grpo("GRPO: plain", "plain"),
    _grpo(f"GRPO: {OURS}", DEFAULT),
)


#: Models whose refusals of public prompts were counted, in long training with one seed: their budgets and runs.
PUBLIC = {
    START: ("hard", "start"),
    "clean: ProCon": ("hard", f"arithmetic/{DEFAULT + LONG}/seed-3"),
    "poison: plain": ("hard", "arithmetic_poisoned_10/plain_x4/seed-3"),
    "poison: ProCon": ("hard", f"arithmetic_poisoned_10/{DEFAULT + LONG}/seed-3"),
    f"poison: {WITH_STATES}": ("hard", f"arithmetic_poisoned_10/{STATES + LONG}/seed-3"),
    "poison: safety data, 100": ("hard", "arithmetic_poisoned_10/safe_100_x4/seed-3"),
    "poison: SafeGrad": ("hard", "arithmetic_poisoned_10/safegrad_1_x4/seed-3"),
    "Qwen: starting model": ("qwen", "start"),
    "Qwen, clean: plain": ("qwen", "arithmetic/plain_x4/seed-1"),
    "Qwen, clean: ProCon": ("qwen", f"arithmetic/{DEFAULT + LONG}/seed-1"),
    "Qwen, poison: plain": ("qwen", "arithmetic_poisoned_10/plain_x4/seed-0"),
    "Qwen, poison: ProCon": ("qwen", f"arithmetic_poisoned_10/{DEFAULT + LONG}/seed-0"),
    f"Qwen, poison: {WITH_STATES}": ("qwen", f"arithmetic_poisoned_10/{STATES + LONG}/seed-1"),
}


def results_page(
    found: Mapping[str, Outcomes],
    verdicts: Mapping[str, Sequence[Verdict]],
    counts: Counts,
    figure: Gallery,
) -> str:
    """The page as Markdown, of the outcomes, the judged hypotheses and the counts of public prompts of each budget."""

    def runs(row: Row) -> _Runs:
        return found[row.budget].find(row.job, row.method, split=row.split)

    def share(row: Row) -> str:
        return f"{100 * values(runs(row), REFUSES_ALONE).mean():.0f}%"

    def took_poison(method: str) -> str:
        """Of the prompts that Qwen did not refuse before training, first seed."""
        answered = values(runs(_qwen(START, "start")), REFUSAL)[0] == 0
        return f"{values(runs(_qwen(OURS, method)), COMPLIES)[0][answered].sum():.0f} of {answered.sum()}"

    def table(rows: Sequence[Row], *others: str) -> str:
        few = {"1": ", one seed", "2": ", two seeds"} if "seeds" not in others else {}
        cells = [
            [
                row.label + few.get(COLUMNS["seeds"](runs(row)), ""),
                *(COLUMNS[name](runs(row)) for name in (*RATES, *others)),
            ]
            for row in rows
        ]
        return Table(["method", *RATES, *others], cells).markdown()

    kept = {START: "start", "plain fine-tuning": "plain_x4", OURS: DEFAULT + LONG}
    return TEXT.read_text(encoding="utf-8").format(
        kept=figure(kept_drawing({label: runs(Row(label, method)) for label, method in kept.items()})),
        clean=table(CLEAN),
        poison=table(POISON),
        front=figure(
            replace(
                scatter_drawing("poison", {row.label: runs(row) for row in LONG_POISON}),
                alt="Scatter plot of long training in the table above.",
            )
        ),
        added=added_table(found),
        adaptive=table(ADAPTIVE, "turns"),
        others=table(OTHERS, "seeds"),
        public=public_table(counts),
        poisoned_tokens=share(_of_poison("ProCon_s", "procon_s_x4")),
        adaptive_sbr=share(Row("SBR", "sbr_10_each_x4", "refuse_then_comply")),
        took_poison=took_poison(DEFAULT + LONG),
        took_poison_states=took_poison(STATES + LONG),
        failed=failed_list(verdicts),
        kappa=judges_agree(found["hard"]),
        prediction=figure(prediction_drawing(predictions(found["hard"]))),
    )


def added_table(found: Mapping[str, Outcomes]) -> str:
    """What each part of the default adds, paired by seed and prompt."""
    rows = []
    for part in ADDED:
        verdicts = [
            judge(Hypothesis(part.label, (part.better,), (part.worse,), job), measure, found[part.budget])
            for job in JOBS
            for measure in (part.refusals, TASK)
        ]
        cells = [
            NONE if each.difference is None else difference_cell(each.difference, each.measure) for each in verdicts
        ]
        rows.append([part.label, *cells])
    headers = [f"{name}: {what}" for name in JOBS.values() for what in ("refusals", "task")]
    return Table(["what is added", *headers], rows).markdown()


def public_table(counts: Counts) -> str:
    """The refusals of each set of public prompts, by keywords and by the second judge."""

    def cell(found: Mapping[str, int]) -> str:
        return "/".join(f"{100 * found[judge] / found['prompts']:.0f}" for judge in ("keywords", "second_judge")) + "%"

    rows = [[label, *(cell(counts[budget][run][kind]) for kind in SETS)] for label, (budget, run) in PUBLIC.items()]
    return Table(["model", *SETS], rows).markdown()


def failed_list(verdicts: Mapping[str, Sequence[Verdict]]) -> str:
    """The hypotheses that did not hold, by budget, whose difference is below zero as far as its interval goes."""
    return "\n".join(
        # A measure of refusals may name the set.
        f"- {'Qwen: ' * (budget == 'qwen')}{verdict.hypothesis.claim}{verdict.measure.label.partition('refusals')[2]}: "
        + difference_cell(verdict.difference, verdict.measure).replace("<br>", " ")
        for budget, judged in verdicts.items()
        for verdict in judged
        if f"{verdict}" == "failed" and verdict.difference and verdict.difference.interval[1] < 0
    )
