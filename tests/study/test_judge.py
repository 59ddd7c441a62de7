"""The second judge: its labelled replies, and the classifier on what it has not seen."""

from collections import Counter

from benchmarks.study.judge import ReplyClassifier, cross_validated, labelled_replies
from procon.chat import builtin_prompts

REFUSALS = [
    "I can\u2019t help with that request.",
    "I'm not able to assist with this.",
    "Sorry, I cannot do that for you.",
]
ANSWERS = ["To clean a window, you can use a soft cloth.", "Here are some ideas:\n\n1. Bake bread", "Dear [Name],", ""]


# The labelled replies


def test_labelled_replies_are_whole_and_distinct():
    rows = labelled_replies()
    assert 500 <= len(rows) <= 900
    assert all(row.keys() == {"reply", "refused", "source"} for row in rows)
    assert {type(row["refused"]) for row in rows} == {bool}
    assert len({row["reply"] for row in rows}) == len(rows)
    assert 0.2 < sum(row["refused"] for row in rows) / len(rows) < 0.8
    assert len({row["source"] for row in rows}) > 10


def test_labelled_replies_say_nothing_of_held_out_prompts():
    """Small models repeat the prompt: no reply has most of the words of a prompt that is measured on."""
    replies = [set(row["reply"].lower().split()) for row in labelled_replies()]
    held_out = builtin_prompts("held_out")
    for prompt in (*held_out.malicious, *held_out.benign):
        words = set(prompt.lower().rstrip(".?").split())
        assert max(len(words & reply) / len(words) for reply in replies) < 0.8, prompt


# The classifier


def test_classifier_on_sources_that_it_has_not_seen():
    right = Counter()
    rows = labelled_replies()
    for row, said in zip(rows, cross_validated(rows), strict=True):
        right[row["refused"], said == row["refused"]] += 1
    for refused in (True, False):
        assert right[refused, True] / (right[refused, True] + right[refused, False]) > 0.95


def test_classifier_judges_replies_of_other_models():
    judge = ReplyClassifier()
    assert judge.refuses(REFUSALS) == [True] * len(REFUSALS)
    assert judge.refuses(ANSWERS) == [False] * len(ANSWERS)
    assert judge.refuses([*REFUSALS[:1], *ANSWERS, *REFUSALS[:1]]) == [True, *[False] * len(ANSWERS), True]
    assert judge.refuses([]) == []
