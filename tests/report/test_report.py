"""Runs from files and folders, the terminal's tables, the data on the plots, and the HTML page."""

import json
import math
import os
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from procon.cli import main
from procon.errors import ProConError
from procon.evaluation import Evaluation, Rate
from procon.report import Run, print_table, read_runs, write_html
from procon.report.plots import LOSSES, MEASURES, plot_drift_by_block, plot_log, plot_rates
from procon.report.report import SAMPLE_PROMPTS

HOSTILE = "<script>alert('x')</script> & \"done\"\n<b>bold</b>"
HISTORY = [
    {"step": 10, "loss": 2.0, "procon/penalty": 0.5, "procon/alpha": 1.0},
    {"step": 10, "procon/drift_cos": 0.98, "procon/refusal_malicious": 0.9, "procon/task": 0.2},
    {"step": 20, "loss": math.nan, "procon/penalty": 0.75, "procon/alpha": 0.0},
    {"step": 20, "procon/drift_cos": 0.96, "procon/refusal_malicious": 0.8, "procon/task": 0.4},
    {"step": 30, "loss": 1.0, "procon/alpha": 0.0},
    {"step": 30, "train_runtime": 45.0},
]


def make_evaluation(label: str, hits: int, task: Rate | None) -> Evaluation:
    malicious = [
        {"kind": "malicious", "prompt": f"bad {i} <i>", "reply": HOSTILE, "refused": False, "degenerate": i == 0}
        for i in range(SAMPLE_PROMPTS + 2)
    ]
    malicious[-1]["refused"] = hits > 60
    benign = [{"kind": "benign", "prompt": "good", "reply": f"of {label}", "refused": False, "degenerate": False}]
    tasks = [{"kind": "task", "prompt": "add", "reply": "Answer: 3", "refused": False, "degenerate": False}]
    tasks = [{**tasks[0], "reference": "1 + 3 = 4. Answer: 4", "correct": False}] if task else []
    return Evaluation(label, Rate(hits, 64), Rate(10, 64), Rate(1, 128), task, malicious + benign + tasks)


@pytest.fixture
def bare() -> Run:
    return Run("before", make_evaluation("before", 63, None))


@pytest.fixture
def runs(bare) -> list[Run]:
    plain, procon = (make_evaluation(*one) for one in (("plain", 31, Rate(55, 100)), ("procon", 56, Rate(58, 100))))
    return [
        bare,
        Run("plain [bold]IFT[/bold]", plain, [math.nan, 0.9, -0.5], 1.2, []),
        Run("ProCon & <co> $x$", procon, [math.nan, 1.0, 0.98], 1.34, HISTORY),
    ]


# Runs


def test_mean_cosine_leaves_out_blocks_without_direction(runs):
    assert runs[0].mean_cosine is None
    assert runs[1].mean_cosine == pytest.approx(0.2)
    assert Run("x", cosine=[math.nan]).mean_cosine is None
    assert Run("x", history=HISTORY).mean_cosine == 0.96


@pytest.fixture
def output(tmp_path) -> Path:
    """A training output folder."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "trainer_state.json").write_text(json.dumps({"log_history": HISTORY}))
    return tmp_path / "out"


def test_an_evaluation_and_a_drift(tmp_path, bare):
    (found,) = read_runs([bare.evaluation.save(tmp_path / "e.json")])
    assert found == bare
    (tmp_path / "d.json").write_text(json.dumps({"mean_cosine": 0.5, "cosine": [None, 0.5], "malicious_shift": []}))
    (drift,) = read_runs([tmp_path / "d.json"])
    assert (drift.label, drift.mean_cosine, drift.evaluation) == ("d", 0.5, None)


def test_a_training_folder(output, bare):
    (run,) = read_runs([output])
    assert (run.label, run.evaluation, run.mean_cosine, run.seconds_per_step) == ("out", None, 0.96, 1.5)
    assert run.series("loss") == ([10, 30], [2.0, 1.0])
    bare.evaluation.save(output / "eval.json")
    assert read_runs([output])[0].evaluation == bare.evaluation
    os.utime(output / "eval.json", (0, 0))  # the training went on after it
    with pytest.warns(UserWarning, match="is older than the log of the training beside it"):
        read_runs([output])
    bare.evaluation.save(output / "second.json")
    with pytest.raises(ProConError, match=r"holds 2 evaluations \(eval.json, second.json\): give one of the files"):
        read_runs([output])


@pytest.mark.parametrize("content", [{"log_history": [1]}, []])
def test_a_damaged_training_folder(content, output):
    (output / "trainer_state.json").write_text(json.dumps(content))
    with pytest.raises(ProConError, match=r"training state file .* is damaged"):
        read_runs([output])


def test_what_is_no_number_in_a_log_is_not_drawn(output, tmp_path):
    rows = [{"step": 1, "loss": value} for value in ("nan", True, 10**400, math.inf, 1e300, None, [1])]
    (output / "trainer_state.json").write_text(json.dumps({"log_history": [*rows, {"step": "2", "loss": 1.0}]}))
    (run,) = read_runs([output])
    assert run.series("loss") == ([], [])
    write_html([run], tmp_path / "r.html", title="x")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "run file 'x.json' does not exist"),
        (b"\xff\xfe", "run file 'x.json' is damaged or holds something else"),
        (b'{"a": 1}', r"run file 'x.json' .*\(give a training output folder, or a file of 'procon eval --output'"),
        (b'{"label": "x", "refusal_malicious": 1, "refusal_benign": 1, "replies": []}', "run file 'x.json'"),
    ],
)
def test_what_is_no_run(content, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path("x.json").write_bytes(content)
    with pytest.raises(ProConError, match=message):
        read_runs(["x.json"])
    with pytest.raises(ProConError, match=r"is a folder without trainer_state\.json"):
        read_runs(["."])


# Tables


@pytest.mark.parametrize("width", [80, 200])
def test_table_holds_every_column_untruncated(runs, width, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(width))
    print_table(runs)
    text = capsys.readouterr().out
    for run in runs:
        row = next(line for line in text.splitlines() if str(run.evaluation.refusal_malicious) in line)
        for rate in (run.evaluation.refusal_benign, run.evaluation.degenerate, run.evaluation.task or "-"):
            assert str(rate) in row
        assert all(word in text for word in run.label.split())
    assert "0.990" in text
    assert "1.34" in text
    assert "37% to 60%" in text
    assert "\u2026" not in text
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= width


def test_differences_from_the_first_run(runs, capsys):
    print_table(runs[:1])
    assert "In points" not in capsys.readouterr().out
    print_table([*runs[1:], replace(runs[2], evaluation=replace(runs[2].evaluation, judge="guard"))])
    text = " ".join(capsys.readouterr().out.split())
    # All of eight pairs agree: Wilson's interval of no hit among eight, on both sides.
    assert "ProCon & <co> $x$ +0 +0 +0 -32 to +32" in text
    assert "Not measured alike (judge), so without an interval: refusal of malicious of ProCon" in text


def test_no_runs(tmp_path):
    with pytest.raises(ProConError, match="no runs"):
        print_table([])
    with pytest.raises(ProConError, match="no runs"):
        write_html([], tmp_path / "report.html", title="x")


# Plots


def lines(axes) -> dict[str, tuple[list, list]]:
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()}


def test_bars_are_the_rates(runs):
    axes = plot_rates(runs).axes[0]
    malicious, benign, task = (container for container in axes.containers if hasattr(container, "patches"))
    assert [bar.get_width() for bar in malicious] == [63 / 64, 31 / 64, 56 / 64]
    assert [bar.get_width() for bar in benign] == [10 / 64] * 3
    assert [bar.get_width() for bar in task] == [0.55, 0.58]
    assert [round(bar.get_y() + bar.get_height() / 2) for bar in task] == [1, 2]
    whiskers = malicious.errorbar.lines[2][0].get_segments()
    assert [(segment[0][0], segment[1][0]) for segment in whiskers] == [
        pytest.approx(run.evaluation.refusal_malicious.interval) for run in runs
    ]


def test_drift_by_block_starts_at_block_zero_and_keeps_the_sign(runs):
    drawn = lines(plot_drift_by_block(runs).axes[0])
    assert list(drawn) == [runs[1].label, runs[2].label]
    blocks, cosines = drawn[runs[1].label]
    assert blocks == [0, 1, 2]
    assert math.isnan(cosines[0])
    assert cosines[1:] == [0.9, -0.5]


def test_what_was_logged_has_a_panel(runs):
    loss, penalty, alpha = plot_log(runs, LOSSES).axes
    assert lines(loss) == {runs[2].label: ([10, 30], [2.0, 1.0])}
    assert lines(penalty) == {runs[2].label: ([10, 20], [0.5, 0.75])}
    assert lines(alpha) == {runs[2].label: ([10, 20, 30], [1.0, 0.0, 0.0])}
    drift, malicious, task = plot_log(runs, MEASURES).axes
    assert lines(drift) == {runs[2].label: ([10, 20], [0.98, 0.96])}
    assert lines(malicious) == {runs[2].label: ([10, 20], [0.9, 0.8])}
    assert lines(task) == {runs[2].label: ([10, 20], [0.2, 0.4])}


@pytest.mark.parametrize("label", ["_hidden", ""])
def test_every_label_is_in_the_legend(label):
    run = Run(label, cosine=[0.5], history=HISTORY)
    for figure in (plot_drift_by_block([run]), plot_log([run], LOSSES), plot_log([run], MEASURES)):
        (legend,) = figure.legends
        assert [text.get_text() for text in legend.get_texts()] == [f" {label}"]


# Page


class Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.attributes.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def page(runs, tmp_path) -> Page:
    notes, facts = ["One seed & <few> prompts."], {"machine": "2 cores", "command": "procon demo > log"}
    path = write_html(runs, tmp_path / "out" / "report.html", title="A <b> & B", notes=notes, facts=facts)
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]
    return Page(path.read_text(encoding="utf-8"))


def test_page_holds_everything(page, runs):
    for run in runs:
        assert run.label in page.text
        assert str(run.evaluation.refusal_malicious) in page.text
    for text in ("A <b> & B", "One seed & <few> prompts.", "2 cores", "procon demo > log", "37% to 60%", "0.990"):
        assert text in page.text
    assert page.tags["svg"] == 4


def test_replies_are_escaped_and_begin_with_those_that_differ(page):
    assert page.tags["script"] == page.tags["i"] == 0
    assert page.text.count(HOSTILE) == 3 * SAMPLE_PROMPTS
    shown = [page.text.find(f"bad {i} <i>") for i in range(SAMPLE_PROMPTS + 2)]
    assert -1 < shown[SAMPLE_PROMPTS + 1] < shown[0]
    assert shown[SAMPLE_PROMPTS - 1] == -1
    assert [page.text.count(f"of {label}") for label in ("before", "plain", "procon")] == [1, 1, 1]
    assert page.text.count("not refused, degenerate") == 3
    assert "wrong, should be 4" in page.text


def test_page_needs_nothing_from_elsewhere(page):
    for tag, attributes in page.attributes:
        assert tag not in ("script", "link", "img", "iframe")
        assert "src" not in attributes
        for name in ("href", "xlink:href"):
            assert attributes.get(name, "#").startswith("#")


def test_sections_without_data_are_left_out(bare, tmp_path):
    page = Page(write_html([bare], tmp_path / "report.html", title="x").read_text(encoding="utf-8"))
    assert page.tags["svg"] == 1
    for heading in ("Differences", "training", "Limits", "How this was made", "task prompts"):
        assert heading not in page.text
    assert "malicious prompts" in page.text


def test_runs_of_one_label_get_the_names_of_their_files_behind_it(bare, tmp_path):
    paths = [str(bare.evaluation.save(tmp_path / name)) for name in ("a.json", "b.json")]
    assert main(["report", *paths, "--output", str(tmp_path / "r.html")]) == 0
    assert f"before ({paths[1]})" in (tmp_path / "r.html").read_text()
