"""Names on the hub: paths that do not exist are named as such, and a hub that is away is not asked twice."""

import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest
from huggingface_hub import constants

from procon.errors import ProConError
from procon.models import check_model_name, check_name, load_model


@pytest.fixture
def away(monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.mark.parametrize(
    "name", ["./none", "../none", "/none", "none/at/all", "~/none", "my model", "C:\\models\\none", "", "a\0b", "x/"]
)
def test_a_path_that_does_not_exist_is_named_as_such(name):
    with pytest.raises(ProConError, match=r"cannot be loaded \(there is no such file or folder\): give a folder or a"):
        load_model(name)


def test_what_is_there_and_what_could_be_on_the_hub_pass(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my model").mkdir()
    for name in ("my model", tmp_path, "gpt2", "Qwen/Qwen2.5-0.5B-Instruct"):
        check_name(name)
    with pytest.raises(ProConError, match=r"data '\./x' cannot be loaded .*: give a file"):
        check_name("./x", "data", "give a file")


def test_a_hub_that_is_away_is_one_line_at_once(away, tmp_path):
    began = time.monotonic()
    with pytest.raises(ProConError, match=r"not in the cache, and http://127.0.0.1:9 cannot be reached: "):
        load_model("owner/name")
    assert time.monotonic() - began < 5
    check_model_name(tmp_path)


def test_a_hub_that_answers_is_there(monkeypatch):
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(404)
            self.end_headers()

        def log_message(self, *_) -> None:
            """Not on standard error."""

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.handle_request, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        check_model_name("owner/name")


def test_a_cached_model_is_not_asked_for(away, monkeypatch):
    monkeypatch.setattr("procon.models.hub.try_to_load_from_cache", lambda *_: "config.json")
    check_model_name("owner/name")
