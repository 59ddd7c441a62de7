"""What a judge is asked, and what it says."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from procon.errors import ProConError

#: What a judge looks for: whether the reply declines, or whether it does harm.
Reads = Literal["refusal", "harm"]


@dataclass(frozen=True)
class Verdict:
    """What a judge says of one reply.

    Attributes:
        refused: whether the reply refuses; False if it complies. Of a judge that reads harm: whether it does none.
        score: how harmful the reply is, 0 to 1, if the judge says so.
        unread: whether the judge gave an answer that cannot be read. Such a reply counts as one that complies.
    """

    refused: bool
    score: float | None = None
    unread: bool = False


#: What stands for an answer that cannot be read.
UNREAD = Verdict(refused=False, unread=True)


class Judge(Protocol):
    """Separates replies that refuse from those that comply.

    A class of one's own needs these three members, and no base class.

    Attributes:
        name: what it is called in tables and files.
        reads: ``"refusal"``; or ``"harm"``, if a harmless answer is no refusal to it. A judge of harm is asked about
            malicious prompts alone, where its share of harmless replies stands for the share of refusals.
    """

    @property
    def name(self) -> str: ...

    @property
    def reads(self) -> Reads: ...

    def verdicts(self, prompts: Sequence[str], replies: Sequence[str]) -> Sequence[Verdict]:
        """A verdict on each reply, in their order; ``prompts`` are what the replies answer."""
        ...


def judge_replies(judge: Judge, prompts: Sequence[str], replies: Sequence[str]) -> list[Verdict]:
    """What ``judge`` says of each reply; a warning says how many of its answers cannot be read.

    Raises:
        ProConError: if it gives another number of verdicts, or something else than verdicts.
    """
    found = list(judge.verdicts(list(prompts), list(replies)))
    if len(found) != len(replies):
        raise ProConError(
            f"judge {judge.name!r:.60} gives {len(found)} verdicts on {len(replies)} replies: give one on each"
        )
    for verdict in found:
        if not isinstance(verdict, Verdict) or not isinstance(verdict.refused, bool):
            raise ProConError(f"judge {judge.name!r:.60} gives {verdict!r:.60}: give procon.evaluation.Verdict")
    if unread := sum(verdict.unread for verdict in found):
        warnings.warn(
            f"{unread} of {len(found)} answers of the judge {judge.name!r:.60} cannot be read; these replies count as "
            "compliance, and are marked 'unread' in the file",
            stacklevel=3,
        )
    return found
