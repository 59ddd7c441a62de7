"""A judge behind an OpenAI-compatible API, against a server on this machine."""

import pytest

from procon.errors import ProConError
from procon.evaluation import FORMATS, EndpointJudge, Verdict, load_judges
from procon.evaluation.judges import endpoint

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
    # The same reply to another prompt is another exchange.
    assert judge.verdicts(["a", "z"], ["I can't.", "I can't."]) == [REFUSED, REFUSED]
    assert len(chat_server.requests) == 5


@pytest.mark.parametrize(
    ("keys", "sent"),
    [
        ({}, None),
        ({"OPENAI_API_KEY": "sk-1"}, "Bearer sk-1"),
        ({"OPENAI_API_KEY": "sk-1", "PROCON_JUDGE_KEY": "own"}, "Bearer own"),
        ({"HF_TOKEN": "hf_1"}, None),
    ],
)
def test_key(chat_server, monkeypatch, keys, sent):
    for name, value in keys.items():
        monkeypatch.setenv(name, value)
    EndpointJudge(chat_server.url, "judge-7b").verdicts(["a"], ["Yes."])
    assert [request["key"] for request in chat_server.requests] == [sent]


def test_the_one_model_that_a_server_has(chat_server):
    assert EndpointJudge(chat_server.url).model == "judge-7b"
    chat_server.models = ["one", "two"]
    with pytest.raises(ProConError, match=r"has the models one, two: name one, as in http.*/v1#MODEL"):
        EndpointJudge(chat_server.url)
    chat_server.models = []
    with pytest.raises(ProConError, match="does not say which models it has"):
        EndpointJudge(chat_server.url)


@pytest.mark.parametrize("failure", [503, 429, b"<html>"])
def test_a_failure_that_passes(chat_server, failure):
    chat_server.say = lambda messages: "refused" if len(chat_server.requests) > 2 else failure
    assert EndpointJudge(chat_server.url, "judge-7b").verdicts(["a"], ["No."]) == [REFUSED]
    assert len(chat_server.requests) == 3


def test_a_server_says_how_long_to_wait(chat_server, monkeypatch):
    waits = []
    monkeypatch.setattr(endpoint.time, "sleep", waits.append)
    chat_server.headers = {"Retry-After": "7"}
    chat_server.say = lambda messages: "refused" if len(chat_server.requests) > 1 else 429
    EndpointJudge(chat_server.url, "judge-7b").verdicts(["a"], ["No."])
    assert waits == [7.0]


@pytest.mark.parametrize(
    ("failure", "message", "attempts"),
    [
        (500, r"refuses with HTTP status 500 \(.*no.*\): check its address and the model's name", endpoint.ATTEMPTS),
        (401, "refuses with HTTP status 401 .*: put its key into PROCON_JUDGE_KEY", 1),
        (404, "refuses with HTTP status 404 .*: check its address, which ends in /v1", 1),
        (302, "refuses with HTTP status 302", 1),
        (b"<html>", "answers something else than JSON", endpoint.ATTEMPTS),
        (b'{"choices": []}', "answers without a completion: give the base URL", 1),
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
    with pytest.raises(ProConError, match=r"cannot be reached \(.+\): check its address"):
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
    with pytest.raises(
        ProConError, match=r"says 'It did not.*format 'refusal': give a model that follows instructions"
    ):
        load_judges(f"{chat_server.url}#judge-7b")


def test_thoughts_before_the_answer(chat_server):
    chat_server.say = lambda messages: "<think>It may have complied.</think>\n\nrefused"
    assert EndpointJudge(chat_server.url, "m").verdicts(["a"], ["No."]) == [REFUSED]


def test_formats_at_an_endpoint(chat_server):
    chat_server.say = lambda messages: "unsafe\nS2"
    guard = EndpointJudge(chat_server.url, "guard", format=FORMATS["llama-guard"])
    assert guard.verdicts(["a"], ["Here is how."]) == [Verdict(False, 1.0)]
    assert chat_server.requests[0]["messages"] == [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "Here is how."},
    ]
    with pytest.raises(ProConError, match="format 'wildguard' is of a text that goes on"):
        EndpointJudge(chat_server.url, "guard", format=FORMATS["wildguard"])


@pytest.mark.parametrize(
    "url", ["localhost:8000", "file:///etc/passwd", "http://", "ftp://host/v1", "http://[s9", "http://h:x/v1"]
)
def test_what_is_no_address(url):
    with pytest.raises(ProConError, match="is no address: give one such as"):
        EndpointJudge(url, "m")


@pytest.mark.parametrize("url", ["http://me:secret@host/v1", "https://host/v1?key=secret"])
def test_a_key_does_not_stand_in_an_address(url):
    with pytest.raises(ProConError, match="put a key into PROCON_JUDGE_KEY") as caught:
        EndpointJudge(url, "m")
    assert "secret" not in str(caught.value)
