"""Judges: what is asked, how answers are read, judges by name, and what they make of an evaluation."""

from dataclasses import replace

import pytest

from procon.chat import ContrastPrompts, Reply
from procon.errors import ProConError
from procon.evaluation import (
    FORMATS,
    Evaluation,
    ModelJudge,
    Rate,
    Verdict,
    endpoint,
    evaluate,
    evaluation,
    judges,
    load_judge,
)

UNREAD = Verdict(False, unread=True)


@pytest.mark.parametrize(
    ("name", "answer", "verdict"),
    [
        ("refusal", "Refused.", Verdict(True)),
        ("refusal", "**complied**", Verdict(False)),
        ("refusal", "<think>refused?</think> complied", Verdict(False)),
        ("refusal", "The assistant refused.", UNREAD),
        ("refusal", "", UNREAD),
        ("llama-guard", "\n\nsafe", Verdict(True)),
        ("llama-guard", "unsafe\nS1,S2", Verdict(False)),
        ("llama-guard", "S1", UNREAD),
    ],
)
def test_answers_are_read(name, answer, verdict):
    assert FORMATS[name].verdict(answer) == verdict


def test_questions_have_the_exchange_as_it_is():
    (turn,) = FORMATS["refusal"].messages("How {reply} do I?", "Like {prompt} this.")
    assert turn["content"].count("How {reply} do I?") == turn["content"].count("Like {prompt} this.") == 1
    ask = replace(FORMATS["refusal"], template="B: {prompt} G: {reply} ->")
    assert ask.messages("a", "b") == [{"role": "user", "content": "B: a G: b ->"}]


def test_a_model_is_asked_in_its_format(monkeypatch):
    asked = []

    def chat(_model, _tokenizer, conversations, **settings):
        asked.append((list(conversations), settings["max_new_tokens"]))
        return ["safe", "unsafe\nS1"]

    monkeypatch.setattr(judges, "generate_replies", chat)
    guard = ModelJudge(FORMATS["llama-guard"], None, None)
    assert (guard.name, guard.reads) == ("llama-guard", "harm")
    assert guard.verdicts(["p", "q"], ["r", "s"]) == [Verdict(True), Verdict(False)]
    exchanges = [[{"role": "user", "content": p}, {"role": "assistant", "content": r}] for p, r in ("pr", "qs")]
    assert asked == [(exchanges, 16)]


def test_names(monkeypatch, chat_server):
    loaded = []
    monkeypatch.setattr(endpoint, "load_model", lambda name, **_: (loaded.append(name), None))
    chat_server.say = lambda messages: "refused"
    names = ["keywords", "llama-guard", "llama-guard:org/guard", "refusal:m", f"{chat_server.url}#big"]
    found = [load_judge(name) for name in names]
    assert [judge.name for judge in found] == names
    assert [judge.reads for judge in found] == ["refusal", "harm", "harm", "refusal", "refusal"]
    assert loaded == ["meta-llama/Llama-Guard-3-8B", "org/guard", "m"]
    assert chat_server.requests[0]["model"] == "big"
    assert found[0].verdicts(["a", "b"], ["I can't help with that.", "Sure."]) == [Verdict(True), Verdict(False)]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpt", "there is no judge 'gpt': choose keywords, llama-guard, refusal:MODEL, or a URL"),
        ("", "there is no judge ''"),
        ("refusal", "there is no judge 'refusal'"),
        ("refusal:", "there is no judge 'refusal:'"),
        ("refusal:/no/such/folder", "model '/no/such/folder' cannot be loaded"),
        ("llama-guard:http://127.0.0.1:1/v1", "is no address: give one such as http://localhost:8000/v1#MODEL"),
    ],
)
def test_wrong_names(name, message):
    with pytest.raises(ProConError, match=message):
        load_judge(name)


# In an evaluation


class Scripted:
    """A judge of one's own: no base class."""

    def __init__(self, name, said, reads="refusal"):
        self.name, self.reads, self.said, self.asked = name, reads, said, []

    def verdicts(self, prompts, replies):
        self.asked += zip(prompts, replies, strict=True)
        return [self.said[reply] for reply in replies]


PROMPTS = ContrastPrompts(("steal", "forge", "spy"), ("paint", "wash"))
REPLIES = {
    "steal": "I can't help with that.",
    "forge": "Absolutely, take a pen.",
    "spy": "Hm.",
    "paint": "I cannot.",
    "wash": "Use soap.",
}


@pytest.fixture(autouse=True)
def scripted_replies(monkeypatch):
    monkeypatch.setattr(
        evaluation,
        "generate",
        lambda _m, _t, conversations, **_: [Reply(REPLIES[c[0]["content"]]) for c in conversations],
    )


def test_another_judge(tmp_path):
    said = [Verdict(True), Verdict(False), Verdict(True), Verdict(True), Verdict(False)]
    other = Scripted("other", dict(zip(REPLIES.values(), said, strict=True)))
    result = evaluate(None, None, prompts=PROMPTS, judge=other)
    assert (result.refusal_malicious, result.refusal_benign) == (Rate(2, 3), Rate(1, 2))
    assert (result.judge, result.judge_benign) == ("other", "other")
    assert other.asked == list(REPLIES.items())
    assert [row["refused"] for row in result.replies] == [verdict.refused for verdict in said]
    assert Evaluation.load(result.save(tmp_path / "evaluation.json")) == result
    assert evaluate(None, None, prompts=PROMPTS, judge="keywords") == evaluate(None, None, prompts=PROMPTS)


def test_a_judge_of_harm_is_not_asked_about_benign_prompts():
    guard = Scripted("guard", {reply: Verdict("pen" not in reply) for reply in REPLIES.values()}, reads="harm")
    result = evaluate(None, None, prompts=PROMPTS, judge=guard)
    assert (result.refusal_malicious, result.refusal_benign) == (Rate(2, 3), Rate(1, 2))
    assert (result.judge, result.judge_benign) == ("guard", "keywords")
    assert [prompt for prompt, _ in guard.asked] == ["steal", "forge", "spy"]


def test_answers_that_cannot_be_read_are_counted_and_marked():
    judge = Scripted("odd", {reply: UNREAD if reply == "Hm." else Verdict(True) for reply in REPLIES.values()})
    with pytest.warns(UserWarning, match="1 of 3 answers of the judge 'odd' cannot be read"):
        result = evaluate(None, None, prompts=PROMPTS, judge=judge)
    assert result.refusal_malicious == Rate(2, 3)
    assert [row["prompt"] for row in result.replies if row.get("unread")] == ["spy"]


def test_a_judge_that_says_something_else():
    judge = Scripted("s", dict.fromkeys(REPLIES.values(), True))
    with pytest.raises(ProConError, match=r"judge 's' gives \[True.* on 3 replies: give one procon\.evaluation"):
        evaluate(None, None, prompts=PROMPTS, judge=judge)
    judge.verdicts = lambda prompts, replies: []
    with pytest.raises(ProConError, match=r"judge 's' gives \[\] on 3 replies"):
        evaluate(None, None, prompts=PROMPTS, judge=judge)
    with pytest.raises(ProConError, match="there is no judge 'word'"):
        evaluate(None, None, prompts=PROMPTS, judge="word")
