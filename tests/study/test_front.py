"""What the page of results begins with: advice, then the hard tables of the models that have runs."""

from made_up_runs import BUDGET, add_fresh, load_runs, pattern, writer

from benchmarks.study import front, report
from benchmarks.study.budgets import PLAIN, START
from benchmarks.study.hard_parts import SEEDS


def test_page_begins_with_advice_and_hard_tables(tmp_path, write, monkeypatch):
    monkeypatch.setattr(front, "ADVICE", tmp_path / "advice.md")
    front.ADVICE.write_text("## What to do\n\n1. **This.**\n")
    for folder, seed, share in (("hard", SEEDS[0], 0.25), ("qwen", 0, 0.5)):
        hard = writer(tmp_path / "all" / folder)
        add_fresh(hard("arithmetic", START, seed, 1.0))
        add_fresh(hard("arithmetic", PLAIN, seed, pattern(share)))
    sections = front.front_sections(tmp_path / "all")
    write("arithmetic", START, 0, 1.0)
    text, _ = report.compose(BUDGET, "table", load_runs(tmp_path / "runs"), "by an echo", sections)
    marks = [
        report.GENERATED,
        "1. **This.**",
        "## Where it is hard",
        front.MODELS["hard"],
        "| IFT | 25 / 25<br>benign 0<br>task 50<br>1 seed |",
        front.MODELS["qwen"],
        "| IFT | 50 / 50<br>benign 0<br>task 50<br>1 seed |",
        "## The paper's methods in short training",
        "## What this does not show",
    ]
    assert sorted(marks, key=text.index) == marks
    assert text.count("In each cell, per cent") == 1


def test_models_without_runs_are_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(front, "ADVICE", tmp_path / "advice.md")
    front.ADVICE.write_text("## What to do\n")
    assert front.front_sections(tmp_path) == ["## What to do"]
