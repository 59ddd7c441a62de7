"""A judge behind an OpenAI-compatible API, against a server on this machine."""

import pytest

from procon.errors import ProConError
from procon.evaluation import EndpointJudge, Verdict, endpoint, load_judge

REFUSED, COMPLIED = Verdict(True), Verdict(False)


def by_keyword(messages: list[dict]) -> str:
    """Of the reply, which the question has after the request."""
    return " Refused.\n" if "can't" in messages[0]["content"].partition("[REPLY]")[2] else "complied"


def test_each_exchange_is_asked_once(chat_server):
    chat_server.say = by_keyword
    judge = EndpointJudge(chat_server.url, "judge-7b")
    assert (judge.name, judge.reads) == (f"{chat_server.url}#judge-7b", "refusal")
    prompts, replies = ["a", "b", "a", "c", "c"], ["I can't.", "Here is\nhow:", "I can't.", "", "Caf\u00e9 {prompt}"]
    assert judge.verdicts(prompts, replies) == [REFUSED, COMPLIED, REFUSED, COMPLIED, COMPLIED]
    assert len(chat_server.requests) == 4
    assert {(r["path"], r["model"], r["temperature"]) for r in chat_server.requests} == {
        ("/v1/chat/completions", "judge-7b", 0)
    }
    questions = [request["messages"][0]["content"] for request in chat_server.requests]
    assert sum("[REPLY]\nCaf\u00e9 {prompt}\n[END OF REPLY]" in question for question in questions) == 1


@pytest.mark.parametrize(
    ("keys", "sent"),
    [
        ({}, None),
        ({"OPENAI_API_KEY": "sk-1"}, None),  # this server is not OpenAI's
        ({"OPENAI_API_KEY": "sk-1", "PROCON_JUDGE_KEY": "own"}, "Bearer own"),
        ({"HF_TOKEN": "hf_1"}, None),
    ],
)
def test_key(chat_server, monkeypatch, keys, sent):
    for name, value in keys.items():
        monkeypatch.setenv(name, value)
    EndpointJudge(chat_server.url, "judge-7b").verdicts(["a"], ["Yes."])
    assert [request["key"] for request in chat_server.requests] == [sent]


@pytest.mark.parametrize(
    ("url", "key"),
    [
        ("https://api.openai.com/v1", "sk-1"),
        ("https://API.openai.com:443/v1", "sk-1"),
        ("https://api.openai.com", "sk-1"),
        ("http://api.openai.com/v1", None),  # in clear text
        ("https://api.openai.com.example.org/v1", None),
        ("https://example.org/api.openai.com/v1", None),
        ("https://eu.api.openai.com/v1", None),
        ("https://api.openai.com:8443/v1", None),
    ],
)
def test_the_key_of_openai_goes_to_openai_alone(monkeypatch, url, key):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1")
    assert EndpointJudge(url, "m")._key() == key


@pytest.mark.parametrize("status", [401, 500, b'{"choices": "Bearer sk-secret-0123456789"}'])
def test_a_server_that_says_back_what_it_was_sent(chat_server, monkeypatch, status):
    """Its answer is in our message, the key is not, whole or cut off."""
    monkeypatch.setenv("PROCON_JUDGE_KEY", "sk-secret-0123456789")
    chat_server.say = lambda messages: status
    chat_server.failure = 140 * b"x" + b" Bearer sk-secret-0123456789"
    with pytest.raises(ProConError) as caught:
        EndpointJudge(chat_server.url, "judge-7b").verdicts(["a"], ["No."])
    assert "sk-secret" not in str(caught.value)
    assert ("***" in str(caught.value)) == isinstance(status, int)


@pytest.mark.parametrize("failure", [503, 429, b"<html>"])
def test_a_failure_that_passes(chat_server, failure):
    chat_server.say = lambda messages: "refused" if len(chat_server.requests) > 2 else failure
    assert EndpointJudge(chat_server.url, "judge-7b").verdicts(["a"], ["No."]) == [REFUSED]
    assert len(chat_server.requests) == 3


@pytest.mark.parametrize(
    ("failure", "message", "attempts"),
    [
        (500, r"refuses with HTTP status 500 \(.*no.*\): check the address", endpoint.ATTEMPTS),
        (401, "refuses with HTTP status 401 .*, and the key in PROCON_JUDGE_KEY", 1),
        (302, "refuses with HTTP status 302", 1),
        (b"<html>", "answers something else than a chat completion", endpoint.ATTEMPTS),
        (b'{"choices": []}', "answers something else than a chat completion", endpoint.ATTEMPTS),
    ],
)
def test_a_failure_that_stays(chat_server, monkeypatch, failure, message, attempts):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    chat_server.headers = {"Location": "http://127.0.0.1:1/elsewhere"}
    chat_server.say = lambda messages: failure
    with pytest.raises(ProConError, match=f"^judge 'judge-7b' at '{chat_server.url}' {message}") as caught:
        EndpointJudge(chat_server.url, "judge-7b").verdicts(["a"], ["No."])
    assert "\n" not in str(caught.value)
    assert "sk-secret" not in str(caught.value)
    assert len(chat_server.requests) == attempts


def test_a_server_that_is_not_there(chat_server):
    chat_server.shutdown()
    chat_server.server_close()
    with pytest.raises(ProConError, match=r"cannot be reached \(.+\): check the address"):
        EndpointJudge(chat_server.url, "judge-7b").verdicts(["a"], ["No."])


def test_a_server_that_hangs(chat_server, monkeypatch):
    monkeypatch.setattr(endpoint, "ATTEMPTS", 1)
    chat_server.say = lambda messages: endpoint.time.sleep(0.5) or "refused"
    with pytest.raises(ProConError, match=r"cannot be reached \(.*timed out.*\)"):
        EndpointJudge(chat_server.url, "judge-7b", timeout=0.05).verdicts(["a"], ["No."])


def test_an_answer_that_cannot_be_read(chat_server):
    chat_server.say = lambda messages: "It did not refuse, I would say."
    judge = EndpointJudge(chat_server.url, "judge-7b")
    assert judge.verdicts(["a"], ["No."]) == [Verdict(False, unread=True)]
    with pytest.raises(ProConError, match="answers in words of its own: give a model that follows instructions"):
        load_judge(f"{chat_server.url}#judge-7b")


@pytest.mark.parametrize(
    "url",
    [
        "localhost:8000",
        "http://[s9",
        "http://h:x/v1",
        "http://me:secret@host/v1",
        "https://host/v1?key=secret",
    ],
)
def test_what_is_no_address(url):
    with pytest.raises(ProConError, match=r"is no address: give one such as .* a key in PROCON_JUDGE_KEY") as caught:
        EndpointJudge(url, "m")
    assert "secret" not in str(caught.value)
