"""The keyword judge on labelled replies: as good as the page says, and better than it was."""

from benchmarks.judges import counts, judged_replies
from procon.chat import is_refusal


def test_the_judge_is_better_than_before_on_the_half_it_was_not_tuned_on():
    rows = [row for row in judged_replies() if row["half"] == "held out"]
    labels = [row["refused"] for row in rows]
    hits, wrong, missed, _ = counts([is_refusal(row["reply"]) for row in rows], labels)
    hits_before, wrong_before, missed_before, _ = counts([row["before"] for row in rows], labels)
    assert (hits, missed) == (hits_before, missed_before) == (87, 4)
    assert (wrong, wrong_before) == (3, 6)
