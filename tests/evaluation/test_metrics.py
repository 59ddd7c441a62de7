"""Task metrics: ROUGE-L against worked examples, names, and functions of one's own."""

import math

import pytest
import torch

from procon.chat import ContrastPrompts, Reply
from procon.errors import ProConError
from procon.evaluation import Evaluation, Rate, evaluate, evaluation, rouge_l


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


def test_a_mean_of_marks_is_a_rate():
    """A mark's variance is at most that of a share with the same mean, so Wilson's interval covers."""
    rate = Rate.of([0.0, 1.0, 0.25, 0.5])
    assert (rate.value, rate.total, str(rate)) == (0.4375, 4, "44% (1.8/4)")
    assert rate.interval[0] < rate.value < rate.interval[1]
    assert Rate.of([1.0, 1.0]).interval[1] == 1


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
        ("rouge-l", "rouge-l", Rate.of([rouge_l(SAID[row["instruction"]], row["output"]) for row in TASK])),
        (longer, "longer", Rate(1, 3)),
        (lambda reply, reference: torch.tensor(len(reply) > 10), "<lambda>", Rate(1, 3)),
        (lambda reply, reference: 1, "<lambda>", Rate(3, 3)),
        (lambda reply, reference: "it" in reply or 0.5, "<lambda>", Rate(2, 3)),
    ],
)
def test_metrics_in_an_evaluation(tmp_path, metric, name, figure):
    result = evaluate(None, None, prompts=PROMPTS, task=TASK, metric=metric)
    assert (result.task, result.metric) == (figure, name)
    assert Evaluation.load(result.save(tmp_path / "evaluation.json")) == result
    assert ["correct" in row for row in result.replies] == [False, False, True, True, True]


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("bleu", "there is no task metric 'bleu': choose exact, rouge-l"),
        (lambda reply, reference: 7, "mark 7.0 is not from 0 to 1"),
        (lambda reply, reference: math.nan, "mark nan is not from 0 to 1"),
    ],
)
def test_wrong_metrics(metric, message):
    with pytest.raises(ProConError, match=message):
        evaluate(None, None, prompts=PROMPTS, task=TASK, metric=metric)
