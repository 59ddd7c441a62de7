"""Judges by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from procon.errors import ProConError
from procon.evaluation.judges.endpoint import EndpointJudge
from procon.evaluation.judges.formats import FORMATS, Format
from procon.evaluation.judges.keywords import KeywordJudge
from procon.evaluation.judges.model import ModelJudge
from procon.evaluation.judges.protocol import Judge
from procon.models import load_model


def load_judges(
    names: str | Sequence[str],
    *,
    progress: bool = True,
    **loading: Any,
) -> list[Judge]:
    """The judges with these names, in a text joined by commas, or in a list.

    - ``keywords``: refusal phrases, in English.
    - ``wildguard``, ``llama-guard``, ``harmbench``: these models from the hub; or ``wildguard:MODEL``, in a folder or
      by another hub name.
    - ``refusal:MODEL``, ``strongreject:MODEL``: any chat model, asked our question, or graded as StrongREJECT grades.
    - ``http://HOST:PORT/v1#MODEL``: our question to an OpenAI-compatible endpoint; ``strongreject:http://...`` and
      ``llama-guard:http://...`` in these formats. Without ``#MODEL``, the one model that it has.

    Models are loaded, and endpoints are asked a first question, so that what is wrong with them shows here.

    Args:
        loading: of :func:`procon.models.load_model`, for judges that are models: dtype, devices, bits, and whether code
            that comes with them is trusted.

    Raises:
        ProConError: if a name is none of these or is given twice, a model cannot be loaded, or an endpoint does not
            answer.
    """
    texts = [name.strip() for name in (names.split(",") if isinstance(names, str) else names)]
    for text in texts:
        if texts.count(text) > 1:
            raise ProConError(f"judge {text!r:.80} is given twice: give each once")
    read = [_read(text) for text in texts]
    return [_load(text, *parts, progress, loading) for text, parts in zip(texts, read, strict=True)]


def _read(text: str) -> tuple[Format | None, str | None]:
    """The format and where its model is; no format for keywords."""
    if text == "keywords":
        return None, None
    if text.startswith(("http://", "https://")):
        return FORMATS["refusal"], text
    name, _, where = text.partition(":")
    found = FORMATS.get(name)
    if found is None:
        raise ProConError(
            f"there is no judge {text!r:.80}: choose keywords, {', '.join(FORMATS)}, or a URL such as "
            "http://localhost:8000/v1#MODEL"
        )
    if not (where or found.model):
        raise ProConError(f"judge {name!r} is a question to any chat model: give one, as in {name}:MODEL or {name}:URL")
    return found, where or found.model


def _load(
    text: str,
    format: Format | None,
    where: str | None,
    progress: bool,
    loading: dict[str, Any],
) -> Judge:
    if format is None or where is None:
        return KeywordJudge()
    if where.startswith(("http://", "https://")):
        url, _, model = where.partition("#")
        judge = EndpointJudge(url, model or None, format=format, name=text)
        judge.check()
        return judge
    model, tokenizer = load_model(where, **loading)
    return ModelJudge(format, model, tokenizer, name=text, progress=progress)
