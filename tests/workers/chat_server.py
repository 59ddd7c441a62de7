"""A server that completes chats, for judges behind an endpoint."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class ChatServer(ThreadingHTTPServer):
    """Completes a chat with what ``say(messages)`` returns: a text, an HTTP status, or another body."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.models: Any = ["judge-7b"]
        self.say: Callable[[list[dict]], str | int | bytes] = lambda messages: "complied"
        self.headers: dict[str, str] = {}
        self.requests: list[dict] = []
        self.failure = b'{"error": "no"}'

    def handle_error(self, *_) -> None:
        """A client that has hung up is no news."""


class _Handler(BaseHTTPRequestHandler):
    server: ChatServer

    def do_GET(self) -> None:
        self._answer(
            200, json.dumps({"object": "list", "data": [{"id": name} for name in self.server.models]}).encode()
        )

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append({"path": self.path, "key": self.headers["Authorization"], **request})
        said = self.server.say(request["messages"])
        if isinstance(said, int):
            self._answer(said, self.server.failure)
        elif isinstance(said, bytes):
            self._answer(200, said)
        else:
            choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": said}}
            self._answer(200, json.dumps({"object": "chat.completion", "choices": [choice]}).encode())

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **self.server.headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_) -> None:
        pass


@contextmanager
def serving() -> Iterator[ChatServer]:
    """It runs within the context."""
    with ChatServer() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.shutdown()
