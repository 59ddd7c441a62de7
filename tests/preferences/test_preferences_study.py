"""The runs of DPO and GRPO, on a tiny model, and the page that is made from run files."""

import re

import pytest

pytest.importorskip("trl", reason="TRL is not installed")

from benchmarks.preferences import __main__ as command
from benchmarks.preferences import report
from benchmarks.preferences.dpo import DPO
from benchmarks.preferences.grpo import GRPO
from benchmarks.preferences.plan import LIVE, PLAIN, PLAN, RUNS, START
from benchmarks.study.judge import load_judge
from benchmarks.study.outcomes import Outcomes
from benchmarks.study.plan import Budget, Part, Size
from benchmarks.study.record import load_run
from benchmarks.study.start import Start, _probe_states, contrast_means
from procon.chat import builtin_prompts
from procon.directions import Directions
from procon.models import load_model

SMALL = Budget(
    tuple(Part(job, job, "Why?", (START, PLAIN, LIVE), (job,), seeds=(0,)) for job in ("dpo", "grpo")),
    Size(train=8, test=4, prompts=4, extraction=8, pairs=4),
)


@pytest.fixture
def small(tiny_model, tokenizer, tmp_path, monkeypatch):
    """The command with a tiny start, few steps, and run files in ``tmp_path / "runs"``."""
    for part in (tiny_model(), tokenizer):
        part.save_pretrained(tmp_path / "start")
    model, own = load_model(tmp_path / "start")
    states = _probe_states(model, own, SMALL.size.pairs)
    directions = Directions.from_means(contrast_means(states))
    prompts = builtin_prompts("extraction").first(8)
    start = Start(tmp_path / "start", own, directions, directions, prompts, states, [7], "")
    monkeypatch.setattr(command, "PLAN", SMALL)
    monkeypatch.setattr(command, "demo_start", lambda folder: folder)
    monkeypatch.setattr(command.Start, "open", lambda *_args, **_settings: start)
    for algorithm, batch in ((DPO, 2), (GRPO, 4)):
        few = {"max_steps": 2, "per_device_train_batch_size": batch, "warmup_steps": 0, "logging_steps": 1}
        monkeypatch.setitem(command.ALGORITHMS, algorithm.name, _with(algorithm, few))
    return tmp_path


def _with(algorithm, few):
    from dataclasses import replace

    shorter = {"num_generations": 2, "max_completion_length": 6} if algorithm is GRPO else {}
    return replace(algorithm, recipe={**algorithm.recipe, **few, **shorter})


def test_runs_and_page(small, capsys):
    runs = small / "runs"
    arguments = ["--runs", str(runs), "--work", str(small)]
    assert command.main(arguments) == 0
    found = {(path.parts[-3], path.parts[-2]): load_run(path) for path in runs.glob("*/*/seed-0.json")}
    assert set(found) == {(job, name) for job in ("dpo", "grpo") for name in ("start", "plain", "live")}
    for (job, name), run in found.items():
        assert run["made"]["trl"]
        assert len(run["replies"]["task"]) == 4
        assert all(0 <= reply["reward"] <= 1 for reply in run["replies"]["task"])
        if name == "start":
            continue
        assert run["steps"] == 2
        assert [row["step"] for row in run["history"]] == [1, 2]
        assert all(("procon/penalty" in row) == (name == "live") for row in run["history"])
        assert all(report.ALGORITHMS[job].logged[1] in row for row in run["history"])
        assert ("pairs" in run) == (job == "dpo")

    # Again: nothing is missing, and nothing is made a second time.
    written = {path: path.stat().st_mtime_ns for path in runs.rglob("*.json")}
    assert command.main(arguments) == 0
    assert {path: path.stat().st_mtime_ns for path in runs.rglob("*") if path.is_file()} == written
    assert "6 of 6 runs" in capsys.readouterr().out

    outcomes = Outcomes.load(SMALL, runs, load_judge(None, None))
    page = report.write_report(SMALL, outcomes, small / "docs")
    text = page.read_text()
    assert "| live-anchors |" not in text
    # In both tables of both parts, and in what is folded.
    assert text.count("| ProCon, live anchors, alpha 0.2 | ") == 8
    assert re.search(r"\| method \| margin in training \| reward, held-out \| pairs right, held-out \|", text)
    assert re.search(r"\| method \| reward in training \| reward, held-out \|\n", text)
    assert text.count("| method | cosine | ") == 2
    assert sorted(re.findall(r"\]\((assets/[^)]+)\)", text)) == [
        str(path.relative_to(small / "docs")) for path in sorted((small / "docs").rglob("*.svg"))
    ]


@pytest.mark.skipif(not RUNS.is_dir(), reason="the runs are not made yet")
def test_the_page_is_that_of_the_run_files():
    """The page and its figures come from the run files, byte for byte."""
    docs = RUNS.parents[2] / "docs"
    text, drawings = report.compose(PLAN, Outcomes.load(PLAN, RUNS, load_judge(None, None)))
    assert (docs / report.PAGE).read_text(encoding="utf-8") == text
    shown = {drawing.name: drawing.file() for drawing in drawings}
    there = {path.stem: path.read_text(encoding="utf-8") for path in (docs / report.FIGURES).glob("*.svg")}
    assert there == shown


def test_no_runs_are_named(tmp_path, capsys):
    assert report.main(["--runs", str(tmp_path), "--output", str(tmp_path)]) == 2
    assert "make them with 'python -m benchmarks.preferences'" in capsys.readouterr().err
