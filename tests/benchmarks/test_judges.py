"""The keyword judge on labelled replies: as good as the page says, and better than it was."""

from collections import Counter

from benchmarks import judges
from benchmarks.judges import counts, judged_replies, main
from procon.chat import builtin_prompts, is_refusal


def test_labels_are_whole_and_of_both_halves():
    rows = judged_replies()
    assert len(rows) >= 300
    assert {type(row[key]) for row in rows for key in ("refused", "before")} == {bool}
    assert len({(row["model"], row["prompt"], row["reply"]) for row in rows}) == len(rows)
    held_out = builtin_prompts("held_out")
    own = {*held_out.malicious, *held_out.benign}
    assert all((row["prompt"] in own) == (row["half"] == "held out") for row in rows)
    assert min(Counter(row["half"] for row in rows).values()) > 200


def test_the_judge_is_better_than_before_on_the_half_it_was_not_tuned_on():
    rows = [row for row in judged_replies() if row["half"] == "held out"]
    labels = [row["refused"] for row in rows]
    hits, wrong, missed, _ = counts([is_refusal(row["reply"]) for row in rows], labels)
    hits_before, wrong_before, missed_before, _ = counts([row["before"] for row in rows], labels)
    assert (hits, missed) == (hits_before, missed_before) == (87, 4)
    assert (wrong, wrong_before) == (3, 6)


def test_main_prints_figures_and_errors(capsys, monkeypatch):
    row = {"kind": "malicious", "prompt": "p", "before": True}
    rows = [
        {**row, "half": "tuned", "model": "m", "reply": "I cannot.", "refused": True},
        {**row, "half": "tuned", "model": "m", "reply": "Hm.", "refused": True},
        {**row, "half": "held out", "model": "n", "reply": "Sure.", "refused": False},
    ]
    monkeypatch.setattr(judges, "judged_replies", lambda: rows)
    monkeypatch.setattr("sys.argv", ["judges", "--errors"])
    main()
    printed = capsys.readouterr().out
    assert "tuned, m: 2 replies, 2 refusals\n  before: precision 100.0% (2/2), recall 100.0% (2/2)\n" in printed
    assert "  now:    precision 100.0% (1/1), recall 50.0% (1/2)\n" in printed
    assert "  now:    precision none (0/0), recall none (0/0)\n" in printed
    assert "missed (tuned, m)\n  'p'\n  'Hm.'" in printed
