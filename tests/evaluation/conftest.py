"""A server that completes chats, for judges behind an endpoint."""

from collections.abc import Iterator

import pytest
from chat_server import ChatServer, serving

from procon.evaluation import endpoint


@pytest.fixture
def chat_server(monkeypatch) -> Iterator[ChatServer]:
    """It runs while the test does; no time is lost between attempts, and no key or proxy is taken from outside."""
    monkeypatch.setattr(endpoint, "WAIT_SECONDS", 0.0)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name in endpoint.KEYS:
        monkeypatch.delenv(name, raising=False)
    with serving() as server:
        yield server
