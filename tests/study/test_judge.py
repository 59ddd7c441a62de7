"""The second judge: its labelled replies, the classifier on what it has not seen, and an endpoint, a real server."""

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from benchmarks.study import judge as module
from benchmarks.study.judge import ReplyClassifier, cross_validated, labelled_replies, load_judge, main
from procon.chat import builtin_prompts
from procon.errors import ProConError

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


# An endpoint


class Server(ThreadingHTTPServer):
    """Completes chats with what ``say(question)`` returns: a text, an HTTP status, or another body."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.say: Callable[[str], str | int | bytes] = lambda question: "answered"
        self.requests: list[dict] = []


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        (message,) = request["messages"]
        seen = {"path": self.path, "key": self.headers["Authorization"], "question": message["content"], **request}
        self.server.requests.append(seen)
        said = self.server.say(message["content"])
        body = b"{}"
        if isinstance(said, bytes):
            body = said
        elif isinstance(said, str):
            choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": said}}
            usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
            completion = {"id": "1", "object": "chat.completion", "created": 0, "model": request["model"]}
            body = json.dumps({**completion, "system_fingerprint": "", "choices": [choice], "usage": usage}).encode()
        self.send_response(said if isinstance(said, int) else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def server(monkeypatch) -> Iterator[Server]:
    monkeypatch.setattr(module, "WAIT_SECONDS", 0.0)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name in ("OPENAI_API_KEY", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    with Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def by_keyword(question: str) -> str:
    return " Refused.\n" if "can't" in question else "answered"


def test_endpoint_is_asked_once_about_each_reply(server):
    server.say = by_keyword
    judge = load_judge(server.url, "judge-7b")
    replies = ['I can\'t say "no".', "Here is\nhow:", 'I can\'t say "no".', "", "Caf\u00e9"]
    assert judge.refuses(replies) == [True, False, True, False, False]
    assert len(server.requests) == 4
    assert {(request["path"], request["model"]) for request in server.requests} == {
        ("/v1/chat/completions", "judge-7b")
    }
    assert {request["temperature"] for request in server.requests} == {0.0}
    for reply in replies:
        quoted = json.dumps(reply, ensure_ascii=False)
        assert sum(f"\n\n{quoted}\n\n" in request["question"] for request in server.requests) == 1
    assert judge.refuses([*replies, "I can't."]) == [True, False, True, False, False, True]
    assert len(server.requests) == 5


@pytest.mark.parametrize(
    ("keys", "sent"),
    [
        ({}, "Bearer none"),
        ({"HF_TOKEN": "hf_1"}, "Bearer hf_1"),
        ({"OPENAI_API_KEY": "sk-2", "HF_TOKEN": "hf_1"}, "Bearer sk-2"),
    ],
)
def test_key_of_the_endpoint(server, monkeypatch, keys, sent):
    for name, value in keys.items():
        monkeypatch.setenv(name, value)
    load_judge(server.url, "judge-7b").refuses(["Yes."])
    assert [request["key"] for request in server.requests] == [sent]


@pytest.mark.parametrize("failure", [503, b"<html>", "Refused? Answered?"])
def test_endpoint_that_fails_at_first(server, failure):
    server.say = lambda question: "refused" if len(server.requests) > 2 else failure
    assert load_judge(server.url, "judge-7b").refuses(["No."]) == [True]
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (500, r"cannot be asked \(.*500.*\): check its address"),
        (401, r"cannot be asked \(.*401.*\): check its address, key"),
        (b"<html>", r"cannot be asked \(.+\): check"),
        (b'{"choices": []}', r"cannot be asked \(.+\): check"),
        ("It did not refuse.", "says 'It did not refuse.', not refused or answered: give a model that"),
        ("", "says '', not refused or answered"),
    ],
)
def test_endpoint_that_fails(server, monkeypatch, failure, message):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    server.say = lambda question: failure
    with pytest.raises(ProConError, match=f"^judge 'judge-7b' at '{server.url}' {message}") as caught:
        load_judge(server.url, "judge-7b").refuses(["No."])
    assert "\n" not in str(caught.value)
    assert "sk-secret" not in str(caught.value)
    assert len(server.requests) == module.ATTEMPTS


def test_endpoint_that_is_not_there(server):
    server.shutdown()
    server.server_close()
    with pytest.raises(ProConError, match="cannot be asked"):
        load_judge(server.url, "judge-7b").refuses(["No."])


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
