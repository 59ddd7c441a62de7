"""What a concept is called, and the prompts that show it: some that have it, and some that do not."""

from __future__ import annotations

import re
from collections.abc import Sequence

from procon.chat import ContrastPrompts
from procon.errors import ProConError

#: Of the prompts of a side, every so manieth is held out to measure on, if there are twice as many at least.
HELD_OUT_EVERY = 5


def check_name(name: object) -> None:
    """Raise ProConError unless ``name`` can stand in logs, files and tables."""
    if not isinstance(name, str) or not re.fullmatch(r"[\w.-]{1,40}", name):
        raise ProConError(f"the name of a concept is {name!r:.80}: give 1 to 40 letters, digits, '_', '-' and '.'")


def contrast(positive: Sequence[str], negative: Sequence[str]) -> ContrastPrompts:
    """Both sides where contrast prompts are taken: positive ones stand where malicious ones do.

    Raises:
        ProConError: if a side has none.
    """
    for side, prompts in {"positive": positive, "negative": negative}.items():
        if not prompts:
            raise ProConError(f"no {side} prompts given: at least one is needed")
    return ContrastPrompts(tuple(positive), tuple(negative))


def hold_out(prompts: ContrastPrompts) -> tuple[ContrastPrompts, ContrastPrompts | None]:
    """Prompts to extract from, and every fifth of each side to measure on; None if a side has fewer than ten."""
    sides = (prompts.malicious, prompts.benign)
    if min(map(len, sides)) < 2 * HELD_OUT_EVERY:
        return prompts, None
    kept = (tuple(p for i, p in enumerate(side, 1) if i % HELD_OUT_EVERY) for side in sides)
    return ContrastPrompts(*kept), ContrastPrompts(*(side[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY] for side in sides))
