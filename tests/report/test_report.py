"""Run files, the terminal table, the data on the plots, and the HTML page."""

import io
import json
import math
from collections import Counter
from html.parser import HTMLParser

import pytest
from rich.console import Console

from procon.errors import ProConError
from procon.evaluation import Evaluation, Rate
from procon.report import (
    Run,
    plot_drift_by_block,
    plot_drift_by_step,
    plot_loss_and_penalty,
    plot_rates,
    plot_rates_by_step,
    print_table,
    write_html,
)
from procon.report.html import SAMPLE_PROMPTS

HOSTILE = "<script>alert('x')</script> & \"done\"\n<b>bold</b>"


def make_evaluation(label: str, hits: int, task: Rate | None) -> Evaluation:
    malicious = [
        {"kind": "malicious", "prompt": f"bad {i} <i>", "reply": HOSTILE, "refused": False, "degenerate": i == 0}
        for i in range(SAMPLE_PROMPTS + 2)
    ]
    benign = [{"kind": "benign", "prompt": "good", "reply": f"of {label}", "refused": False, "degenerate": False}]
    tasks = []
    if task is not None:
        tasks = [
            {
                "kind": "task",
                "prompt": "add",
                "reply": "Answer: 3",
                "refused": False,
                "degenerate": False,
                "reference": "1 + 3 = 4. Answer: 4",
                "correct": False,
            }
        ]
    return Evaluation(label, Rate(hits, 64), Rate(10, 64), Rate(1, 128), task, malicious + benign + tasks)


HISTORY = [
    {"step": 10, "loss": 2.0, "procon/penalty": 0.5, "procon/alpha": 1.0},
    {"step": 10, "procon/drift_cos": 0.98, "procon/refusal_malicious": 0.9, "procon/task": 0.2},
    {"step": 20, "loss": math.nan, "procon/penalty": 0.75, "procon/alpha": 0.0},
    {"step": 20, "procon/drift_cos": 0.96, "procon/refusal_malicious": 0.8, "procon/task": 0.4},
    {"step": 30, "loss": 1.0, "procon/alpha": 0.0},
    {"train_runtime": 12.5},
]


@pytest.fixture
def runs() -> list[Run]:
    return [
        Run("before", make_evaluation("before", 63, None)),
        Run("plain [bold]IFT[/bold]", make_evaluation("plain", 31, Rate(55, 100)), [math.nan, 0.9, -0.5], 1.2, []),
        Run("ProCon & <co> $x$", make_evaluation("procon", 56, Rate(58, 100)), [math.nan, 1.0, 0.98], 1.34, HISTORY),
    ]


@pytest.fixture
def bare() -> Run:
    return Run("before", make_evaluation("before", 63, None))


# Run


def test_mean_cosine_leaves_out_blocks_without_direction(runs):
    assert runs[0].mean_cosine is None
    assert runs[1].mean_cosine == pytest.approx(0.2)
    assert Run("x", runs[0].evaluation, [math.nan]).mean_cosine is None


def test_nan_becomes_null_and_comes_back(runs, tmp_path):
    path = runs[2].save(tmp_path / "run.json")
    stored = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not standard JSON"))
    assert stored["cosine"] == [None, 1.0, 0.98]
    assert stored["history"][2]["loss"] is None
    loaded = Run.load(path)
    assert math.isnan(loaded.cosine[0])
    assert loaded.cosine[1:] == [1.0, 0.98]
    assert loaded.evaluation == runs[2].evaluation
    assert loaded.series("loss") == runs[2].series("loss") == ([10, 30], [2.0, 1.0])
    assert loaded.to_dict() == runs[2].to_dict()


def test_run_without_measurements_round_trips(bare, tmp_path):
    assert Run.load(bare.save(tmp_path / "run.json")) == bare


@pytest.mark.parametrize("damage", [lambda text: text[:-20], lambda text: text.replace('"cosine"', '"cos"')])
def test_damaged_run_file(runs, tmp_path, damage):
    path = runs[1].save(tmp_path / "run.json")
    path.write_text(damage(path.read_text()))
    with pytest.raises(ProConError, match=r"run file .*run\.json.* damaged"):
        Run.load(path)


# Table


def printed(runs, **console) -> str:
    console = Console(file=io.StringIO(), **console)
    print_table(runs, console)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [100, 200])
def test_table_holds_every_column_untruncated(runs, width):
    text = printed(runs, width=width)
    for word in ("run", "malicious", "benign", "degenerate", "accuracy", "cosine", "seconds", "per step"):
        assert word in text
    for run in runs:
        row = next(line for line in text.splitlines() if str(run.evaluation.refusal_malicious) in line)
        for rate in (run.evaluation.refusal_benign, run.evaluation.degenerate, run.evaluation.task or "-"):
            assert str(rate) in row
        assert run.label in row
    assert "0.990" in text
    assert "1.34" in text
    assert "\u2026" not in text
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= width


def test_intervals_appear_where_they_fit(runs):
    assert "37-60" not in printed(runs, width=100)
    assert "48% (31/64) 37-60" in printed(runs, width=200)
    assert "48% (31/64)\x1b[2m 37-60" in printed(runs, width=200, force_terminal=True, color_system="standard")


def test_long_labels_fold_at_width_100(bare):
    label = "ProCon_wu_safe, alpha 2 for four epochs, then plain fine-tuning, seed 3"
    text = printed([Run(label, bare.evaluation)], width=100)
    assert "98% (63/64)" in text
    assert all(word in text for word in label.split())
    assert max(map(len, text.splitlines())) <= 100


def test_piped_output_is_as_wide_as_it_needs_to_be(runs, capsys, monkeypatch):
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "40")
    print_table(runs)
    text = capsys.readouterr().out
    row = next(line for line in text.splitlines() if "ProCon" in line)
    rates = "88% (56/64) 77-94 16% (10/64) 9-26 1% (1/128) 0-4 58% (58/100) 48-67"
    assert " ".join(row.split()) == f"ProCon & <co> $x$ {rates} 0.990 1.34"
    assert "\x1b" not in text


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


def test_drift_by_step_with_alpha_beneath(runs):
    drift, alpha = plot_drift_by_step(runs).axes
    assert lines(drift) == {runs[2].label: ([10, 20], [0.98, 0.96])}
    assert lines(alpha) == {runs[2].label: ([10, 20, 30], [1.0, 0.0, 0.0])}


def test_drift_by_step_without_alpha(bare):
    run = Run("x", bare.evaluation, history=[{"step": 5, "procon/drift_cos": 0.9}])
    assert len(plot_drift_by_step([run]).axes) == 1


def test_rates_by_step_draws_logged_measures_alone(runs):
    malicious, task = plot_rates_by_step(runs).axes
    assert lines(malicious) == {runs[2].label: ([10, 20], [0.9, 0.8])}
    assert lines(task) == {runs[2].label: ([10, 20], [0.2, 0.4])}


def test_loss_and_penalty_skip_what_is_not_finite(runs):
    loss, penalty = plot_loss_and_penalty(runs).axes
    assert lines(loss) == {runs[2].label: ([10, 30], [2.0 - 1.0 * 0.5, 1.0])}  # without alpha times the penalty
    assert lines(penalty) == {runs[2].label: ([10, 20], [0.5, 0.75])}


@pytest.mark.parametrize("label", ["_hidden", ""])
def test_every_label_is_in_the_legend(bare, label):
    run = Run(label, bare.evaluation, [0.5], history=HISTORY)
    for plot in (plot_drift_by_block, plot_drift_by_step, plot_loss_and_penalty):
        (legend,) = plot([run]).legends
        assert [text.get_text() for text in legend.get_texts()] == [f" {label}"]


def test_a_run_looks_the_same_in_every_plot(runs):
    styles = {
        (line.get_color(), line.get_linestyle())
        for plot in (plot_drift_by_block, plot_drift_by_step, plot_rates_by_step, plot_loss_and_penalty)
        for axes in plot(runs).axes
        for line in axes.get_lines()
        if line.get_label() == runs[2].label
    }
    assert len(styles) == 1


# Page


class Page(HTMLParser):
    """Elements, ids, text and attributes of a page; fails on unbalanced tags."""

    VOID = frozenset({"meta", "br", "link"})

    def __init__(self, html: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.ids: Counter[str] = Counter()
        self.attributes: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags[tag] += 1
        self.attributes.append((tag, attributes))
        if "id" in attributes:
            self.ids[attributes["id"]] += 1
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def page(runs, tmp_path) -> Page:
    path = write_html(
        runs,
        tmp_path / "out" / "report.html",
        title="A <b> & B",
        notes=["One seed & <few> prompts."],
        facts={"machine": "2 cores", "command": "procon demo > log"},
    )
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]
    return Page(path.read_text(encoding="utf-8"))


def test_page_holds_everything(page, runs):
    # Two tables, each prompt with its replies, a legend for each plot of lines that the run has data for. Beside the
    # bars, labels go over two lines.
    prompts = SAMPLE_PROMPTS + 1 + 1
    assert [page.text.count(run.label) for run in runs[1:]] == [2 + prompts + 1, 2 + prompts + 4]
    for run in runs:
        assert run.label in page.text
        assert str(run.evaluation.refusal_malicious) in page.text
    for text in ("A <b> & B", "One seed & <few> prompts.", "2 cores", "procon demo > log", "37-60", "0.990"):
        assert text in page.text
    assert page.tags["svg"] == 5


def test_replies_are_escaped_and_side_by_side(page):
    assert page.tags["script"] == 0
    assert page.tags["i"] == 0
    assert page.text.count(HOSTILE) == 3 * SAMPLE_PROMPTS
    assert f"bad {SAMPLE_PROMPTS - 1} <i>" in page.text
    assert f"bad {SAMPLE_PROMPTS} <i>" not in page.text
    assert [page.text.count(f"of {label}") for label in ("before", "plain", "procon")] == [1, 1, 1]
    assert page.text.count("not refused, degenerate") == 3
    assert "wrong, should be 4" in page.text


def test_page_needs_nothing_from_elsewhere(page):
    for tag, attributes in page.attributes:
        assert tag not in ("script", "link", "img", "iframe")
        assert "src" not in attributes
        for name in ("href", "xlink:href"):
            assert attributes.get(name, "#").startswith("#")


def test_page_is_accessible(page):
    plots = [attributes for tag, attributes in page.attributes if tag == "svg"]
    assert all(plot["role"] == "img" and len(plot["aria-label"]) > 40 for plot in plots)
    assert "plain [bold]IFT[/bold]: refuses 48% (31/64) of malicious" in plots[0]["aria-label"]
    headers = [attributes for tag, attributes in page.attributes if tag == "th"]
    assert headers
    assert all(header.get("scope") in ("row", "col") for header in headers)
    assert {page.ids[name] for name in page.ids} == {1}


def test_references_inside_plots_resolve(page):
    targets = [
        value.split("#")[1].rstrip(")")
        for _, attributes in page.attributes
        for value in attributes.values()
        if value and "#" in value and (value.startswith("#") or value.startswith("url(#"))
    ]
    assert targets
    assert set(targets) <= set(page.ids)


def test_ink_follows_the_page(page):
    styles = " ".join(attributes.get("style") or "" for _, attributes in page.attributes)
    assert "#010203" not in styles
    assert "#040506" not in styles
    assert "currentColor" in styles


def test_sections_without_data_are_left_out(bare, tmp_path):
    page = Page(write_html([bare], tmp_path / "report.html", title="x").read_text(encoding="utf-8"))
    assert page.tags["svg"] == 1
    for heading in ("Drift", "by step", "Loss", "Limits", "How this was made", "task prompts"):
        assert heading not in page.text
    assert "malicious prompts" in page.text


def test_two_pages_of_the_same_runs_are_equal(runs, tmp_path):
    first, second = (write_html(runs, tmp_path / name, title="x").read_bytes() for name in ("a.html", "b.html"))
    assert first == second
