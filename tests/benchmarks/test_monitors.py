"""The benchmark of monitors: prompts, probes, figures by definition, a run on a tiny model, and the page."""

import json
import re
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from benchmarks.monitors import report
from benchmarks.monitors.__main__ import RUNS
from benchmarks.monitors.logistic import fit
from benchmarks.monitors.plan import BUDGET, RESULT, START, Variant
from benchmarks.monitors.prompts import CONCEPTS, PAIRS, labelled_prompts
from benchmarks.monitors.readings import Loss, Reading, Readings
from benchmarks.monitors.trial import run_trial
from benchmarks.monitors.watched import Watched
from benchmarks.study.jobs import JOBS
from benchmarks.study.plan import Size
from benchmarks.study.record import Cell
from procon.errors import ProConError
from procon.evaluation import measure_monitors
from procon.files import save_json

ROOT = Path(__file__).parents[2]
PLAIN, ANCHORED = RESULT.methods[1:]
SIZE = Size(train=24, test=2, epochs=0.25, prompts=2, extraction=8, pairs=4)


@pytest.mark.parametrize("concept", CONCEPTS)
def test_prompts_are_twins_and_none_is_in_two_splits(concept):
    seen = []
    for split, pairs in PAIRS.items():
        found = labelled_prompts(concept, split)
        assert len(found.malicious) == len(found.benign) == pairs
        seen += [*found.malicious, *found.benign]
    assert len(seen) == len(set(seen))
    assert labelled_prompts(concept, "held_out", 3).benign == labelled_prompts(concept, "held_out").benign[:3]


def test_probes_are_fitted_to_where_the_loss_has_no_slope():
    random = torch.Generator().manual_seed(0)
    positive, negative = torch.randn(2, 20, 6, generator=random).double() * 3 + 5
    positive[:, 2] += 4
    vector, bias = fit(positive, negative, decay := 0.01)
    states, labels = torch.cat([positive, negative]), torch.tensor([1.0] * 20 + [0.0] * 20).double()
    wrong = torch.sigmoid(states @ vector + bias) - labels
    square = (states - states.mean(0)).square().sum(-1).mean()  # the decay counts in units of the spread
    assert wrong.mean().abs() < 1e-5
    slope = (wrong[:, None] * (states - states.mean(0))).mean(0) + 2 * decay * square * vector
    assert slope.abs().max() < 1e-4
    assert vector.abs().argmax() == 2


def reading(*sides) -> Reading:
    return Reading(3, *(np.array(side, float) for side in sides))


def test_figures_by_definition():
    random = np.random.default_rng(0)
    positive, negative = random.normal(1, 1, 30), random.normal(0, 1, 30)
    before = reading(positive, negative)
    assert before.auroc == pytest.approx(roc_auc_score([1] * 30 + [0] * 30, [*positive, *negative]))
    assert reading([1, 1], [1, 0]).auroc == 0.75
    found = reading([1, 2, -1, 3], [-1, -2, 1, 0])
    assert (found.caught, found.false_alarms, found.accuracy) == (0.75, 0.25, 0.75)
    distance = positive.mean() - negative.mean()
    assert reading(positive - distance, negative + 0.5 * distance).shifts(before) == pytest.approx((-1, 0.5))


def test_what_is_lost_and_its_interval():
    random = np.random.default_rng(0)
    before = reading(random.normal(2, 1, 64), random.normal(0, 1, 64))
    assert Loss.of(before, [before, before]) == Loss(0, 0, 0)
    after = [reading(random.normal(mean, 1, 64), random.normal(0, 1, 64)) for mean in (1.0, 0.5)]
    found = Loss.of(before, after)
    assert found.mean == pytest.approx(before.auroc - (after[0].auroc + after[1].auroc) / 2)
    assert found.low < found.mean < found.high
    assert Loss.of(before, after) == found


@pytest.fixture
def watched(tiny_model, tokenizer, tmp_path) -> Watched:
    torch.manual_seed(0)
    tiny_model().save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    with pytest.warns(UserWarning, match="refuses 0 of"):
        return Watched.open(tmp_path / "start", tmp_path, SIZE)


def test_monitors_are_trained_once_and_read_as_the_library_reads_them(watched, tmp_path):
    again = Watched.open(tmp_path / "start", tmp_path, SIZE)
    assert again.monitors.hash == watched.monitors.hash
    assert watched.monitors.names == CONCEPTS
    assert (watched.monitors.vectors.any(-1).sum(0) == 1).all()
    model = watched.model()
    found = watched.read(model, "held_out")
    prompts = {concept: labelled_prompts(concept, "held_out", 4) for concept in CONCEPTS}
    library = measure_monitors(model, watched.tokenizer, watched.monitors, prompts, progress=False)
    for concept in CONCEPTS:
        one, expected = Reading.of({"monitors": found}, concept), library[concept]
        assert one.auroc == pytest.approx(expected.auroc[one.site].item())
        assert one.positive.mean() == pytest.approx(expected.positive[one.site].item(), abs=1e-4)
        assert one.caught == expected.caught[one.site].item()
    assert watched.directions("refusal+monitors").concepts == ("refusal", *CONCEPTS)
    with pytest.raises(ProConError, match="directions is 'language': give refusal, monitors, or refusal"):
        watched.directions("language")


def test_a_run(watched, tmp_path):
    """Of three steps, with probes of all concepts; what comes out is a run file that the page can be made of."""
    cell = Cell("arithmetic", ANCHORED.name, 0)
    run = run_trial(watched, ANCHORED, JOBS["arithmetic"], 0, "held_out", SIZE, tmp_path)
    assert run["steps"] == 3
    assert all("procon/penalty" in row for row in run["history"])
    if ANCHORED.twins:
        lines = (tmp_path / f"probes-{ANCHORED.twins}.txt").read_text().splitlines()
        assert len(lines) == 2 * len(CONCEPTS) * ANCHORED.twins
        assert (
            lines[:2] == [side[0] for side in asdict(labelled_prompts("malicious", "extraction")).values() if side][:2]
        )
    save_json({**made_up(cell, ANCHORED, 0.0), **run}, cell.path(tmp_path / "runs"))
    (loaded,) = Readings.load(BUDGET, tmp_path / "runs").runs
    assert loaded["rates"]["task"] == [0, 2]


def made_up(cell: Cell, variant: Variant, lost: float) -> dict:
    """A run file whose monitors have an AUROC of ``1 - lost``: of 10 prompts without, so many score highest."""
    side = [float(i) for i in range(1, 11)]
    negative = [20.0 if i < round(10 * lost) else -1.0 for i in range(10)]
    return {
        "setting": cell.job,
        "method": json.loads(json.dumps(asdict(variant))),
        "seed": cell.seed,
        "made": {
            **dict.fromkeys(("machine", "python", "torch", "transformers", "peft", "commit"), "x"),
            "date": "2026-01-01T00:00:00+00:00",
        },
        "split": cell.split,
        "blocks": 30,
        "monitors_hash": "abc",
        "monitors": {concept: {"site": 30, "positive": side, "negative": negative} for concept in CONCEPTS},
        "rates": {"malicious": [9, 10], "benign": [1, 10], "task": [5, 10]},
        "steps": 160,
        "train_seconds": 60.0 if variant.length else 0.0,
        "seconds": 90.0,
    }


@pytest.fixture
def page(tmp_path):
    """Writes runs that lost so much, and composes the page."""

    def compose(plain: float | None, anchored: float | None, **more) -> str:
        for variant, lost in ((START, 0.0), (PLAIN, plain), (ANCHORED, anchored)):
            for seed in RESULT.seeds if variant.length else RESULT.seeds[:1]:
                if lost is not None:
                    cell = Cell("arithmetic", variant.name, seed)
                    save_json({**made_up(cell, variant, lost), **more}, cell.path(tmp_path))
        return report.compose(Readings.load(BUDGET, tmp_path))

    return compose


@pytest.mark.parametrize(
    ("plain", "anchored", "said"),
    [
        (0.2, 0.0, "It is **reached**: plain fine-tuning loses that much on malicious"),
        (0.2, 0.1, "It is **missed** for malicious and language and sentiment; plain"),
        (0.0, 0.0, "It cannot be judged: plain fine-tuning loses 0.000 at most."),
        (0.2, None, "It is open: runs are missing."),
    ],
)
def test_verdict(page, plain, anchored, said):
    text = page(plain, anchored)
    assert said in text
    assert "## What was tried" not in text
    assert "| language, the last output | start | 1.000 | - |" in text
    assert f"| language | plain fine-tuning | {1 - plain:.3f}, {1 - plain:.3f} | +{plain:.3f}<br>" in text
    assert text == page(plain, anchored)


def test_runs_that_do_not_belong_together(page, tmp_path):
    page(0.2, 0.1)
    cell = Cell("arithmetic", PLAIN.name, 1)
    run = made_up(cell, PLAIN, 0.2)
    save_json({**run, "monitors_hash": "def"}, cell.path(tmp_path))
    with pytest.raises(ProConError, match="are of 2 sets of monitors"):
        Readings.load(BUDGET, tmp_path)
    save_json({**run, "method": {**run["method"], "length": 1.0}}, cell.path(tmp_path))
    with pytest.raises(ProConError, match=r"was made with length 1\.0, but the plan has 4\.0"):
        Readings.load(BUDGET, tmp_path)
    with pytest.raises(ProConError, match="there are no runs in"):
        Readings.load(BUDGET, tmp_path / "empty")


@pytest.mark.skipif(not RUNS.is_dir(), reason="the runs are not made yet")
def test_the_page_is_that_of_the_run_files(tmp_path, capsys):
    assert report.main(["--output", str(tmp_path)]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "monitors.md")]
    assert (tmp_path / "monitors.md").read_bytes() == (ROOT / "docs" / "monitors.md").read_bytes()
    assert re.search("python -m benchmarks.monitors.report", report.GENERATED)
    assert all(cell.path(RUNS).is_file() for cell in BUDGET.cells())


def test_command(tmp_path, capsys):
    assert report.main(["--runs", str(tmp_path)]) == 2
    assert "there are no runs in" in capsys.readouterr().err
