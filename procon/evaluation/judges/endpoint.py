"""A model behind an OpenAI-compatible API as a judge: vLLM, SGLang, llama.cpp, Ollama, or a provider."""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from procon.errors import ProConError
from procon.evaluation.judges.formats import FORMATS, Format
from procon.evaluation.judges.protocol import Reads, Verdict

#: Where the key is looked for, in this order.
KEYS = ("PROCON_JUDGE_KEY", "OPENAI_API_KEY")

#: How often a request is sent, and how many seconds pass after the first failure, doubled each time.
ATTEMPTS, WAIT_SECONDS = 4, 1.0

#: Longest wait that a server may ask for, in seconds.
_LONGEST_WAIT = 60.0

#: What passes by itself, as a rule: too many requests, a server that is busy, starting, or behind a slow proxy.
_PASSING = frozenset({408, 409, 425, 429, 500, 502, 503, 504})

#: Bytes of an answer that are read; a verdict is a word.
_LONGEST_ANSWER = 4_000_000


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """An answer that sends elsewhere is a failure: the key would go there too."""

    def redirect_request(self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirects)


class EndpointJudge:
    """Asks a model that a server runs; each exchange once.

    The key, if the server wants one, is taken from the environment variable ``PROCON_JUDGE_KEY``, or else from
    ``OPENAI_API_KEY``. Prompts and replies are sent to the server.

    Args:
        url: base URL of the API, such as ``http://localhost:8000/v1``.
        model: its name there; not needed if the server has only one.
        format: what is asked.
        name: what it is called in tables and files; ``URL#MODEL`` if not given.
        timeout: seconds that a request may take.
        at_once: requests under way at the same time.

    Raises:
        ProConError: if the URL is none, or the server does not say which model it has.
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        *,
        format: Format = FORMATS["refusal"],
        name: str | None = None,
        timeout: float = 60.0,
        at_once: int = 4,
    ) -> None:
        try:
            parts = urllib.parse.urlsplit(url)
            known = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:  # of brackets or of a port that are none
            known = False
        if not known:
            raise ProConError(f"judge {url!r:.80} is no address: give one such as http://localhost:8000/v1#MODEL")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ProConError(
                f"the judge's address at {parts.hostname!r} has more than host, port and path: put a key into "
                f"{KEYS[0]}, and a model's name behind #"
            )
        if not format.chat:
            raise ProConError(f"format {format.name!r} is of a text that goes on, not of a chat: load that judge here")
        self.url, self.format = url.rstrip("/"), format
        self._timeout, self._at_once = timeout, at_once
        self._known: dict[tuple[str, str], Verdict] = {}
        self.model = model or self._only_model()
        self.name = name or f"{self.url}#{self.model}"

    @property
    def reads(self) -> Reads:
        """What its format asks for."""
        return self.format.reads

    def check(self) -> None:
        """Ask about a plain refusal, so that a wrong address, key or model shows before the work.

        Raises:
            ProConError: if the server cannot be asked, or its answer cannot be read.
        """
        answer = self._answer(("Tell me a joke.", "I'm sorry, but I can't help with that."))
        if self.format.verdict(answer).unread:
            raise ProConError(
                f"{self._who()} says {answer!r:.60} to the question of format {self.format.name!r}: "
                "give a model that follows instructions"
            )

    def verdicts(self, prompts: Sequence[str], replies: Sequence[str]) -> list[Verdict]:
        """What the model says of each reply.

        Raises:
            ProConError: if the server cannot be asked.
        """
        exchanges = list(zip(prompts, replies, strict=True))
        unknown = [exchange for exchange in dict.fromkeys(exchanges) if exchange not in self._known]
        pool = ThreadPoolExecutor(self._at_once)
        try:
            for exchange, answer in zip(unknown, pool.map(self._answer, unknown), strict=True):
                self._known[exchange] = self.format.verdict(answer)
        finally:
            pool.shutdown(cancel_futures=True)  # after an error the others are not asked
        return [self._known[exchange] for exchange in exchanges]

    def _answer(self, exchange: tuple[str, str]) -> str:
        request = {
            "model": self.model,
            "messages": self.format.messages(*exchange),
            "temperature": 0,
            # A model that thinks needs room for that; one that does not ends by itself.
            "max_tokens": 2048,
        }
        completion = self._send("/chat/completions", request)
        try:
            return str(completion["choices"][0]["message"]["content"] or "")
        except (KeyError, IndexError, TypeError):
            raise ProConError(
                f"{self._who()} answers without a completion: give the base URL of a chat completions API"
            ) from None

    def _only_model(self) -> str:
        self.model = None
        try:
            models = [str(model["id"]) for model in self._send("/models")["data"]]
        except (KeyError, TypeError):
            models = []
        if len(models) == 1:
            return models[0]
        if models:
            raise ProConError(
                f"{self._who()} has the models {', '.join(models):.200}: name one, as in {self.url}#MODEL"
            )
        raise ProConError(f"{self._who()} does not say which models it has: name one, as in {self.url}#MODEL")

    def _send(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """The JSON that the server answers; again if a failure may pass."""
        failure = ProConError(f"{self._who()} was not asked: try again")
        for attempt in range(ATTEMPTS):
            try:
                return self._once(path, body)
            except urllib.error.HTTPError as error:
                with error:
                    failure = self._refusal(error)
                    wait = error.headers.get("Retry-After", "")
                if error.code not in _PASSING:
                    raise failure from None
                asked_for = float(wait) if wait.isdecimal() else 0.0
            except (OSError, http.client.HTTPException) as error:
                reason = getattr(error, "reason", None) or error
                failure = ProConError(f"{self._who()} cannot be reached ({reason}): check its address")
                asked_for = 0.0
            except ValueError as error:
                failure = ProConError(
                    f"{self._who()} answers something else than JSON ({error!s:.60}): check its address"
                )
                asked_for = 0.0
            if attempt + 1 < ATTEMPTS:
                time.sleep(max(WAIT_SECONDS * 2**attempt, min(asked_for, _LONGEST_WAIT)))
        raise failure from None

    def _once(self, path: str, body: dict[str, Any] | None) -> Any:
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "procon"}
        if key := next(filter(None, map(os.environ.get, KEYS)), None):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        # The scheme was looked at: http or https.
        request = urllib.request.Request(self.url + path, data, headers)  # noqa: S310
        with _OPENER.open(request, timeout=self._timeout) as answer:
            return json.loads(answer.read(_LONGEST_ANSWER))

    def _refusal(self, error: urllib.error.HTTPError) -> ProConError:
        said = " ".join(error.read(2000).decode(errors="replace").split())
        remedy = {
            401: f"put its key into {KEYS[0]}",
            403: f"put its key into {KEYS[0]}",
            404: "check its address, which ends in /v1 as a rule, and the model's name",
            429: "wait, or ask for a higher limit",
        }.get(error.code, "check its address and the model's name")
        return ProConError(
            f"{self._who()} refuses with HTTP status {error.code} ({said or error.reason:.160}): {remedy}"
        )

    def _who(self) -> str:
        return f"judge {self.model!r} at {self.url!r}" if self.model else f"judge at {self.url!r}"
