"""The one exception that a user is expected to meet, and texts from outside as one line that is safe to print."""

from __future__ import annotations

import re

#: Characters of a line, at most, and of its end, where the remedy stands.
_LONGEST, _END = 2_000, 700


def printable(text: str) -> str:
    """``text`` as one line without commands to the terminal: they are shown as Python would write them, ``\\x1b``.

    So is what cannot be seen, changes the order of letters, or cannot be encoded. A line of more than 2,000 characters
    loses its middle.
    """
    text = re.sub(r"[\t\r\n]+", " ", text)
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST - _END]} ... {text[-_END:]}"
    return visible(text)


def visible(text: str) -> str:
    """``text``, of one line or several, without commands to the terminal."""
    return "".join(letter if letter.isprintable() or letter in "\n\t" else repr(letter)[1:-1] for letter in text)


class ProConError(ValueError):
    """Bad input or an impossible set-up: one line that names the thing and the remedy.

    The command line prints the line alone and exits with code 2; from Python it is a ``ValueError``.
    """

    # Not when it is made: compiled code makes it too, and its compiler follows no constructor of an error's own.
    def __str__(self) -> str:
        return printable(super().__str__())
