"""The second judge: its labelled replies, the classifier on what it has not seen, and an endpoint."""

import json
from collections import Counter

import pytest

from benchmarks.study import judge as module
from benchmarks.study.judge import ReplyClassifier, cross_validated, labelled_replies, load_judge, main
from procon.chat import builtin_prompts
from procon.errors import ProConError
from procon.evaluation import EndpointJudge as ChatJudge

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


@pytest.fixture(scope="module")
def predictions() -> list[bool]:
    """What classifiers say that have seen only the other sources."""
    return cross_validated(labelled_replies())


def test_classifier_on_sources_that_it_has_not_seen(predictions):
    right = Counter()
    for row, said in zip(labelled_replies(), predictions, strict=True):
        right[row["refused"], said == row["refused"]] += 1
    for refused in (True, False):
        assert right[refused, True] / (right[refused, True] + right[refused, False]) > 0.95


def test_classifier_judges_replies_of_other_models():
    judge = load_judge()
    assert isinstance(judge, ReplyClassifier)
    assert judge.refuses(REFUSALS) == [True] * len(REFUSALS)
    assert judge.refuses(ANSWERS) == [False] * len(ANSWERS)
    assert judge.refuses([]) == []


def test_classifier_is_the_same_whenever_it_is_made():
    replies = [row["reply"] for row in labelled_replies()]
    first, second = (load_judge()._pipeline.predict_proba(replies) for _ in range(2))
    assert (first == second).all()


def test_main_shows_how_far_the_judges_agree(capsys, monkeypatch, predictions):
    monkeypatch.setattr(module, "cross_validated", lambda rows: predictions)
    main()
    printed = capsys.readouterr().out
    rows = labelled_replies()
    assert printed.startswith(f"{len(rows)} labelled replies of ")
    right = sum(said == row["refused"] for said, row in zip(predictions, rows, strict=True))
    assert (
        f"classifier, trained on the other sources: right on {right / len(rows):.1%} ({right}/{len(rows)})" in printed
    )
    for row, said in zip(rows, predictions, strict=True):
        if said != row["refused"]:
            assert f"{'refused' if said else 'answered'}: {row['reply']!r}" in printed


# An endpoint; tests/evaluation/test_endpoint_judge.py has the rest of it


def test_endpoint_is_asked_about_the_reply_alone(monkeypatch):
    asked = []

    def answer(self, exchange):
        (message,) = self.format.messages(*exchange)
        asked.append(message["content"])
        return "Refused." if "can't" in message["content"] else "complied"

    monkeypatch.setattr(ChatJudge, "_answer", answer)
    judge = load_judge("http://127.0.0.1:9/v1", "judge-7b")
    replies = ['I can\'t say "no".', "Here is\nhow:", 'I can\'t say "no".', "", "Caf\u00e9"]
    assert judge.refuses(replies) == [True, False, True, False, False]
    assert len(asked) == 4
    for reply in replies:
        quoted = json.dumps(reply, ensure_ascii=False)
        assert sum(f"\n\n{quoted}\n\n" in question for question in asked) == 1


def test_endpoint_that_says_something_else(monkeypatch):
    monkeypatch.setattr(ChatJudge, "_answer", lambda self, exchange: "It did not refuse.")
    with pytest.raises(ProConError, match=r"judge .*#judge-7b' says neither refused nor complied of 'No\.'"):
        load_judge("http://127.0.0.1:9/v1", "judge-7b").refuses(["No."])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "judge-7b"}, "model is 'judge-7b', but endpoint is missing: give the base URL"),
        ({"endpoint": "http://localhost:1"}, "endpoint is 'http://localhost:1', but model is missing: give the name"),
    ],
)
def test_endpoint_and_model_go_together(arguments, message):
    with pytest.raises(ProConError, match=message):
        load_judge(**arguments)
