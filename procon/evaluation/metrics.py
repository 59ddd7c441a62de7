"""Is a task reply right? Exact match, containment, ROUGE-L, or a function of one's own."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from procon.errors import ProConError

#: From a reply and its reference, whether it is right, or how good it is, 0 to 1.
Metric = Callable[[str, str], bool | float]


def extract_answer(text: str) -> str:
    """The final answer of ``text``: what follows its last "Answer:" on that line, or else the whole text.

    Normalised for comparison: lower case, single spaces, no full stop at the end, no commas between thousands.
    """
    marked = re.findall(r"answer:[^\S\n]*([^\n]*)", text, flags=re.IGNORECASE)
    answer = " ".join((marked[-1] if marked else text).casefold().split()).rstrip(". ")
    return re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", answer)


def exact_match(reply: str, reference: str) -> bool:
    """Whether ``reply`` and ``reference`` come to the same final answer."""
    return extract_answer(reply) == extract_answer(reference)


def contains_answer(reply: str, reference: str) -> bool:
    """Whether the reference's final answer stands somewhere in ``reply``, as whole words, by the same normalisation.

    A reply that names several answers, the right one among them, passes.
    """
    answer = extract_answer(reference)
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", " ".join(reply.casefold().split()))
    # No decimal point or sign next to it either: 12 is not in 12.5, nor in -12.
    return bool(answer) and re.search(rf"(?<![\w.-]){re.escape(answer)}(?!\w|[.]\d)", text) is not None


def rouge_l(reply: str, reference: str) -> float:
    """ROUGE-L (Lin 2004): F1 of the longest common subsequence of words, 0 to 1; two texts without words give 0.

    Words are runs of a to z and 0 to 9 in lower case, without stemming, as in Google's ``rouge-score``.
    """
    words, known = (re.findall(r"[a-z0-9]+", text.lower()) for text in (reply, reference))
    common = _common_subsequence(words, known)
    return 2 * common / (len(words) + len(known)) if common else 0.0


def _common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    lengths = [0] * (len(second) + 1)
    for word in first:
        before = 0
        for place, other in enumerate(second, 1):
            before, lengths[place] = (
                lengths[place],
                before + 1 if word == other else max(lengths[place], lengths[place - 1]),
            )
    return lengths[-1]


#: Metrics by name.
METRICS: dict[str, Metric] = {"exact": exact_match, "contains": contains_answer, "rouge-l": rouge_l}


def find_metric(metric: str | Metric) -> tuple[str, Metric]:
    """A metric and its name.

    Raises:
        ProConError: if there is none of that name.
    """
    if callable(metric):
        return getattr(metric, "__name__", type(metric).__name__), metric
    if metric not in METRICS:
        raise ProConError(f"there is no task metric {metric!r:.60}: choose {', '.join(METRICS)}, or pass a function")
    return metric, METRICS[metric]


def score(metric: Metric, name: str, reply: str, reference: str) -> bool | float:
    """What a metric says of a reply.

    Raises:
        ProConError: if it says neither yes or no nor a number from 0 to 1.
    """
    said: Any = metric(reply, reference)
    found = said.item() if hasattr(said, "item") else said  # a number of numpy's or torch's
    if isinstance(found, bool):
        return found
    if not isinstance(found, int | float) or not 0 <= found <= 1:
        raise ProConError(f"task metric {name!r:.60} gives {said!r:.40}: give true or false, or a number from 0 to 1")
    return float(found)
