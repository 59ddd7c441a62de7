"""Two runs compared: intervals against published figures and by coverage, pairs, flips and settings."""

import io
import json
import math
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from rich.console import Console

from procon.cli import main
from procon.evaluation import Evaluation, Rate
from procon.report import Run, Source, compare_runs, print_comparison
from procon.report.comparison import paired_interval, unpaired_interval

STUDY = Path(__file__).parents[2] / "benchmarks" / "study" / "runs" / "table" / "arithmetic"


def test_unpaired_interval_as_published():
    """Newcombe, Statistics in Medicine 17 (1998), page 873, table II, example (a): 56/70 and 48/80."""
    low, high = unpaired_interval(Rate(48, 80), Rate(56, 70))
    assert (low, high) == (pytest.approx(0.0524, abs=5e-5), pytest.approx(0.3339, abs=5e-5))


@pytest.mark.parametrize(
    "chances", [(0.4, 0.1, 0.1, 0.4), (0.7, 0.05, 0.15, 0.1), (0.25, 0.25, 0.25, 0.25), (0.0, 0.0, 0.6, 0.4)]
)
def test_paired_interval_covers(chances):
    """Exactly, over all outcomes of 24 pairs: close to 95% of them have the true difference within."""
    n, covered = 24, 0.0
    true = chances[2] - chances[1]
    for both, first, second in product(range(n + 1), repeat=3):
        neither = n - both - first - second
        if neither < 0:
            continue
        counts = (both, first, second, neither)
        if any(count and not chance for count, chance in zip(counts, chances, strict=True)):
            continue
        chance = math.exp(
            math.lgamma(n + 1)
            - sum(math.lgamma(count + 1) for count in counts)
            + sum(count * math.log(p) for count, p in zip(counts, chances, strict=True) if count)
        )
        pairs = [(True, True)] * both + [(True, False)] * first + [(False, True)] * second + [(False, False)] * neither
        low, high = paired_interval(pairs)
        covered += chance * (low - 1e-12 <= true <= high + 1e-12)
    assert 0.93 <= covered <= 1


def test_pairs_narrow_the_interval_and_order_does_not_matter():
    pairs = [(True, True)] * 30 + [(False, False)] * 30 + [(False, True)] * 6
    low, high = paired_interval(pairs)
    wide = unpaired_interval(Rate(30, 66), Rate(36, 66))
    assert wide[0] < low < 6 / 66 < high < wide[1]
    swapped = paired_interval([(after, before) for before, after in pairs])
    assert swapped == (pytest.approx(-high), pytest.approx(-low))


def evaluation(verdicts: dict[str, bool], label: str = "x") -> Evaluation:
    replies = [
        {"kind": "malicious", "prompt": prompt, "reply": f"{label}", "refused": refused, "degenerate": False}
        for prompt, refused in verdicts.items()
    ]
    return Evaluation(label, Rate.of(verdicts.values()), Rate(0, 1), Rate(0, 1), None, replies)


def source(verdicts, kind="study", **settings) -> Source:
    return Source(Path("x"), Run("x", evaluation(verdicts)), kind, settings)


def test_prompts_are_paired_by_their_text():
    before = source({"a": True, "b": False, "c": False}, seed=1, alpha=0.2)
    after = source({"c": True, "a": True, "b": False}, seed=1, alpha=0.3, further=1)
    found = compare_runs(before, after)
    (row,) = found.differences
    assert row.paired
    assert [(flip.prompt, flip.before, flip.after) for flip in row.flips] == [("c", False, True)]
    assert row.value == pytest.approx(1 / 3)
    assert found.settings == {"alpha": (0.2, 0.3), "further": (None, 1)}


def test_other_prompts_are_not_paired_and_other_kinds_share_few_settings():
    found = compare_runs(source({"a": True}, seed=1, alpha=1), source({"b": True}, "training", seed=2, rate=1))
    (row,) = found.differences
    assert not row.paired
    assert row.flips == []
    assert row.interval == unpaired_interval(Rate(1, 1), Rate(1, 1))
    assert found.settings == {"seed": (1, 2)}
    file = io.StringIO()
    print_comparison(found, Console(file=file, width=80))
    assert "Prompts differ, so intervals are not of pairs: refusal of malicious." in " ".join(file.getvalue().split())


ASKED = {"system_prompt": None, "template_kwargs": {"enable_thinking": False}}
SET = {"malicious": {"name": "harmbench"}}
MEASURED = {
    "judge": {"judges": ["wildguard"]},
    "system_prompt": {"chat": {**ASKED, "system_prompt": "Obey."}},
    "sources": {"sources": SET},
}


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize("name", MEASURED)
def test_rates_that_were_measured_otherwise_have_no_interval(tmp_path, capsys, name, folder):
    """A judge or a chat makes the rate; other prompts make the interval unpaired, which is said already."""
    alike = replace(evaluation({"a": True, "b": True}), chat=ASKED)
    paths = [tmp_path / "a.json", tmp_path / "out" / "b.json"]
    alike.save(paths[0])
    other = replace(alike, **MEASURED[name], replies=evaluation({"a": False, "b": True}).replies)
    other.save(paths[1])
    (tmp_path / "out" / "procon.json").write_text('{"schedule": "0.2"}')
    second = paths[1].parent if folder else paths[1]
    assert main(["compare", str(paths[0]), str(second), "--output", str(tmp_path / "c.json")]) == 0
    head, _, rest = " ".join(capsys.readouterr().out.split()).partition("B - A, in points")
    (row,) = (data := json.loads((tmp_path / "c.json").read_text()))["differences"]
    assert data["settings"].keys() == {f"evaluation.{name}"}
    assert f"evaluation.{name}" in rest
    assert "Settings of training are not compared" in rest
    if name == "sources":
        assert (row["unlike"], row["paired"], len(row["flips"])) == ([], True, 1)
    else:
        assert (row["unlike"], row["interval"], row["flips"]) == ([f"evaluation.{name}"], None, [])
        assert f"Not measured alike (evaluation.{name}), so without an interval: refusal of malicious." in head
        assert " to " not in rest
        assert "no to yes" not in rest


def test_what_measured_an_older_file_is_not_known():
    """An evaluation of an earlier version does not say how the model was asked."""
    older, newer = (Source(Path("x"), Run("x", evaluation({"a": True})), "evaluation") for _ in range(2))
    newer = replace(newer, run=Run("x", replace(newer.run.evaluation, chat=ASKED)))
    (row,) = compare_runs(older, newer).differences
    assert (row.unlike, row.interval) == ([], pytest.approx((-0.79, 0.79), abs=0.1))


def test_runs_of_the_study_from_the_shell(tmp_path, capsys):
    paths = [str(STUDY / method / "seed-0.json") for method in ("plain", "procon_s")]
    assert main(["compare", *paths, "--output", str(tmp_path / "c.json")]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.replace(str(tmp_path), "").splitlines())) <= 110
    data = json.loads((tmp_path / "c.json").read_text())
    replies = [json.loads(Path(path).read_text())["replies"]["malicious"] for path in paths]
    gained = sum(not one["refused"] and other["refused"] for one, other in zip(*replies, strict=True))
    lost = sum(one["refused"] and not other["refused"] for one, other in zip(*replies, strict=True))
    assert f"refusal of malicious: {gained} prompts from no to yes, {lost} from yes to no" in printed
    row = data["differences"][0]
    assert (row["paired"], len(row["flips"])) == (True, gained + lost)
    assert row["interval"][0] < row["difference"] < row["interval"][1]
    assert "procon_schedule" in data["settings"]
    assert data["figures"]["seconds per step"][1] > 0

    assert main(["report", *paths, "--output", str(tmp_path / "r.html"), "--title", "Two <runs>"]) == 0
    assert "Two &lt;runs&gt;" in (tmp_path / "r.html").read_text()
    assert main(["report", "none.json", "--output", str(tmp_path / "n.html")]) == 2
    assert "procon: error: run 'none.json' does not exist: give" in capsys.readouterr().err
    assert not (tmp_path / "n.html").exists()
