"""A model behind an OpenAI-compatible API as a judge (vLLM, SGLang, llama.cpp, Ollama, a provider), and judges by name.

Prompts and replies are sent to the server, and the key that the environment has for it.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from procon.errors import ProConError
from procon.evaluation.judges import FORMATS, Format, Judge, KeywordJudge, ModelJudge, Reads, Verdict
from procon.models import load_model

#: Scheme, host, port and path: a key has no place in it.
_ADDRESS = re.compile(r"https?://(\[[\da-f:.]+\]|[\w.-]+)(:\d{1,5})?(/[\w.~/-]*)?", re.ASCII | re.IGNORECASE)

#: Where the key is looked for, in this order: for any server, and for OpenAI's own alone.
KEYS = ("PROCON_JUDGE_KEY", "OPENAI_API_KEY")
_OPENAI = re.compile(r"https://api\.openai\.com(:443)?(/|$)", re.IGNORECASE)

#: How often a question is sent, and how many seconds pass after the first failure, doubled each time.
ATTEMPTS, WAIT_SECONDS = 5, 1.0

#: Questions under way at the same time.
_AT_ONCE = 4

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
    """Asks a model that a server runs.

    The key, if the server wants one, is taken from the environment variable ``PROCON_JUDGE_KEY``; for OpenAI's own
    server, ``https://api.openai.com``, also from ``OPENAI_API_KEY``. No message has it.

    Args:
        url: base URL of the API, such as ``http://localhost:8000/v1``.
        model: its name there.
        format: what is asked.
        name: what it is called in tables and files; ``URL#MODEL`` if not given.
        timeout: seconds that a request may take.

    Raises:
        ProConError: if the URL is none, or has more than host, port and path; without a model.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        format: Format = FORMATS["refusal"],
        name: str | None = None,
        timeout: float = 60.0,
    ) -> None:
        if not _ADDRESS.fullmatch(url) or not model:
            raise ProConError(
                f"judge {url.rpartition('@')[2].partition('?')[0]!r:.80} is no address: give one such as "
                f"http://localhost:8000/v1#MODEL, and a key in {KEYS[0]}"
            )
        self.url, self.model, self.format, self.timeout = url.rstrip("/"), model, format, timeout
        self.name = name or f"{self.url}#{model}"
        self.reads: Reads = format.reads

    def verdicts(self, prompts: Sequence[str], replies: Sequence[str]) -> list[Verdict]:
        """What the model says of each reply; of an exchange that is there twice, it is asked once.

        Raises:
            ProConError: if the server cannot be asked.
        """
        exchanges = list(zip(prompts, replies, strict=True))
        unlike = list(dict.fromkeys(exchanges))
        pool = ThreadPoolExecutor(_AT_ONCE)
        try:
            answers = dict(zip(unlike, pool.map(self._answer, unlike), strict=True))
        finally:
            pool.shutdown(cancel_futures=True)  # after an error the others are not asked
        return [self.format.verdict(answers[exchange]) for exchange in exchanges]

    def _answer(self, exchange: tuple[str, str]) -> str:
        # A model that thinks needs room for that; one that does not ends by itself.
        body = {"model": self.model, "messages": self.format.messages(*exchange), "temperature": 0, "max_tokens": 2048}
        headers = {"Content-Type": "application/json", "User-Agent": "procon"}
        if key := self._key():
            headers["Authorization"] = f"Bearer {key}"
        # The scheme was looked at: http or https.
        request = urllib.request.Request(f"{self.url}/chat/completions", json.dumps(body).encode(), headers)  # noqa: S310
        failure = "was not asked"
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(WAIT_SECONDS * 2 ** (attempt - 1))
            try:
                with _OPENER.open(request, timeout=self.timeout) as answer:
                    return str(json.loads(answer.read(_LONGEST_ANSWER))["choices"][0]["message"]["content"] or "")
            except urllib.error.HTTPError as error:
                with error:
                    said = " ".join(error.read(2000).decode(errors="replace").split())
                # Before it is cut: a server may say back what it was sent.
                said = _without(key, said or str(error.reason))
                failure = f"refuses with HTTP status {error.code} ({said:.160})"
                if error.code not in _PASSING:
                    break
            except (OSError, http.client.HTTPException) as error:
                failure = f"cannot be reached ({_without(key, str(getattr(error, 'reason', None) or error))})"
            except (ValueError, LookupError, TypeError) as error:
                failure = f"answers something else than a chat completion ({_without(key, str(error)):.60})"
        raise ProConError(
            f"judge {self.model!r} at {self.url!r} {failure}: check the address, which ends in /v1 as a rule, the "
            f"model's name, and the key in {KEYS[0]}"
        )

    def _key(self) -> str | None:
        names = KEYS if _OPENAI.match(self.url) else KEYS[:1]
        return next(filter(None, map(os.environ.get, names)), None)


def _without(key: str | None, text: str) -> str:
    """``text``, with stars in the place of the key, and of what it begins with."""
    if not key:
        return text
    return re.sub(re.escape(key[:8]) + r"\S*", "***", text)


def load_judge(name: str, *, progress: bool = True, **loading: Any) -> Judge:
    """The judge of this name.

    - ``keywords``: refusal phrases, in English.
    - ``llama-guard``: Llama Guard 3 from the hub; or ``llama-guard:MODEL``, in a folder or by another hub name.
    - ``refusal:MODEL``: any chat model, asked our question.
    - ``http://HOST:PORT/v1#MODEL``: our question to an OpenAI-compatible endpoint; ``llama-guard:http://...`` in that
      format.

    A model is loaded, and an endpoint is asked a first question, so that what is wrong with them shows here.

    Args:
        loading: of :func:`procon.models.load_model`, for a judge that is a model: dtype, devices, bits, and whether
            code that comes with it is trusted.

    Raises:
        ProConError: if the name is none of these, a model cannot be loaded, or an endpoint does not answer.
    """
    if name == "keywords":
        return KeywordJudge()
    kind, _, where = ("refusal", "", name) if name.startswith(("http://", "https://")) else name.partition(":")
    format = FORMATS.get(kind)
    where = where or (format and format.model)
    if format is None or not where:
        raise ProConError(
            f"there is no judge {name!r:.80}: choose keywords, llama-guard, refusal:MODEL, or a URL such as "
            "http://localhost:8000/v1#MODEL"
        )
    if where.startswith(("http://", "https://")):
        url, _, model = where.partition("#")
        judge = EndpointJudge(url, model, format=format, name=name)
        if judge.verdicts(["Tell me a joke."], ["I'm sorry, but I can't help with that."])[0].unread:
            raise ProConError(f"judge {name!r} answers in words of its own: give a model that follows instructions")
        return judge
    model, tokenizer = load_model(where, **loading)
    return ModelJudge(format, model, tokenizer, name=name, progress=progress)
