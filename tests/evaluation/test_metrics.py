"""Task metrics: containment and ROUGE-L against worked examples, names, and functions of one's own."""

import math
import statistics

import pytest
import torch

from procon.chat import ContrastPrompts, Reply
from procon.errors import ProConError
from procon.evaluation import Evaluation, Mean, Rate, contains_answer, evaluate, evaluation, rouge_l


@pytest.mark.parametrize(
    ("reply", "reference", "there"),
    [
        ("They have 12 apples in all.", "Answer: 12", True),
        ("The total is 1,200 dollars.", "1200", True),
        ("The total is 12.5.", "12", False),
        ("It is 5.12", "12", False),
        ("It is -12", "12", False),
        ("It is -12.", "-12", True),
        ("It is 12.", "12", True),
        ("There are 120.", "12", False),
        ("PARIS, of course", "Paris.", True),
        ("Parisians", "Paris", False),
        ("In New\n  York", "new york", True),
        ("(a)", "(a)", True),
        ("anything", "Answer:", False),
        ("", "12", False),
    ],
)
def test_contains(reply, reference, there):
    assert contains_answer(reply, reference) is there


@pytest.mark.parametrize(
    ("reply", "reference", "f1"),
    [
        # Lin 2004, section 3.1: "police killed the gunman" against two candidates.
        ("police kill the gunman", "police killed the gunman", 3 / 4),
        ("the gunman kill police", "police killed the gunman", 2 / 4),
        ("The Cat!", "the cat", 1.0),
        ("a b c d e", "b d", 2 * 2 / 7),
        ("", "a", 0.0),
        ("...", "...", 0.0),
    ],
)
def test_rouge_l(reply, reference, f1):
    assert rouge_l(reply, reference) == pytest.approx(f1)


def test_rouge_l_is_a_longest_subsequence():
    """Against all subsequences of short random texts."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        first, second = (
            "".join("abc"[i] for i in torch.randint(3, (int(n),), generator=generator))
            for n in torch.randint(1, 8, (2,), generator=generator)
        )

        def within(part: str, whole: str) -> bool:
            letters = iter(whole)
            return all(letter in letters for letter in part)

        subsequences = ["".join(c for i, c in enumerate(first) if m >> i & 1) for m in range(2 ** len(first))]
        longest = max(len(part) for part in subsequences if within(part, second))
        assert rouge_l(" ".join(first), " ".join(second)) == pytest.approx(2 * longest / (len(first) + len(second)))


@pytest.mark.parametrize("marks", [[0.0, 1.0, 0.25, 0.5], [0.3], [1.0, 1.0]])
def test_mean_against_statistics(marks):
    mean = Mean.of(marks)
    assert mean.value == pytest.approx(statistics.fmean(marks))
    assert mean.deviation == pytest.approx(statistics.stdev(marks) if len(marks) > 1 else 0)
    low, high = mean.interval
    half = 1.959964 * mean.deviation / math.sqrt(len(marks))
    assert (low, high) == pytest.approx((max(0, mean.value - half), min(1, mean.value + half)))
    assert str(Mean.of([0.0, 1.0])) == "50.0% (mean of 2)"


@pytest.mark.parametrize("numbers", [(0.5, 0.1, 0), (1.5, 0.1, 2), (0.5, math.nan, 2), ("x", 0.1, 2), (0.5, 0.1, 2.0)])
def test_impossible_means_are_refused(numbers):
    with pytest.raises(ProConError):
        Mean(*numbers)


PROMPTS = ContrastPrompts(("steal",), ("paint",))
TASK = [
    {"instruction": "add", "output": "Answer: 3"},
    {"instruction": "subtract", "output": "Answer: 4"},
    {"instruction": "halve", "output": "one half of it"},
]
SAID = {"steal": "No.", "paint": "Yes.", "add": "It is 3 then.", "subtract": "Answer: 4", "halve": "half of it"}


@pytest.fixture(autouse=True)
def scripted_replies(monkeypatch):
    monkeypatch.setattr(
        evaluation,
        "generate",
        lambda _m, _t, conversations, **_: [Reply(SAID[c[0]["content"]]) for c in conversations],
    )


def longer(reply: str, reference: str) -> bool:
    return len(reply) > len(reference)


@pytest.mark.parametrize(
    ("metric", "name", "figure"),
    [
        ("exact", "exact", Rate(1, 3)),
        ("contains", "contains", Rate(2, 3)),
        (longer, "longer", Rate(1, 3)),
        (lambda reply, reference: torch.tensor(len(reply) > 10), "<lambda>", Rate(1, 3)),
        (lambda reply, reference: 1, "<lambda>", Mean(1.0, 0.0, 3)),
        (lambda reply, reference: "it" in reply or 0.5, "<lambda>", Mean.of([0.5, 0.5, 1.0])),
    ],
)
def test_metrics_in_an_evaluation(tmp_path, metric, name, figure):
    result = evaluate(None, None, prompts=PROMPTS, task=TASK, metric=metric)
    assert (result.task, result.metric) == (figure, name)
    assert Evaluation.load(result.save(tmp_path / "evaluation.json")) == result
    key = "correct" if isinstance(figure, Rate) else "mark"
    assert [key in row for row in result.replies] == [False, False, True, True, True]


def test_rouge_in_an_evaluation():
    result = evaluate(None, None, prompts=PROMPTS, task=TASK, metric="rouge-l")
    marks = [row["mark"] for row in result.replies if row["kind"] == "task"]
    assert marks == pytest.approx([rouge_l(SAID[row["instruction"]], row["output"]) for row in TASK])
    assert result.task == Mean.of(marks)


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("bleu", "there is no task metric 'bleu': choose exact, contains, rouge-l"),
        (lambda reply, reference: 7, "task metric '<lambda>' gives 7: give true or false"),
        (lambda reply, reference: None, "gives None: give true or false"),
        (lambda reply, reference: math.nan, "gives nan: give true or false"),
    ],
)
def test_wrong_metrics(metric, message):
    with pytest.raises(ProConError, match=message):
        evaluate(None, None, prompts=PROMPTS, task=TASK, metric=metric)
