"""The one exception that a user is expected to meet, also for an extra that is not installed; and texts from outside as
one line that is safe to print."""

from __future__ import annotations

import re
from importlib.util import find_spec

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
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


class ProConError(ValueError):
    """Bad input or an impossible set-up: one line that names the thing and the remedy.

    The command line prints the line alone and exits with code 2; from Python it is a ``ValueError``.
    """

    # Not when it is made: compiled code makes it too, and its compiler follows no constructor of an error's own.
    def __str__(self) -> str:
        return printable(super().__str__())


_TRAIN = ("transformers", "accelerate", "peft", "datasets", "jinja2", "tqdm", "xxhash")
_REPORT = (*_TRAIN, "matplotlib", "rich")
_CLI = (*_REPORT, "yaml")

#: What each extra of ``setup.py`` that the library asks for brings, by the names that are imported.
EXTRAS = {
    "train": _TRAIN,
    "trl": (*_TRAIN, "trl"),
    "report": _REPORT,
    "cli": _CLI,
    "demo": (*_CLI, "gguf"),
}


def require_extra(extra: str, for_: str) -> str:
    """Refuse what needs an extra that is not installed; returns the extra's name.

    The door of a room says by ``__extra__`` which one it needs, ahead of its imports.

    Args:
        extra: one of :data:`EXTRAS`.
        for_: what needs it, as the user knows it.

    Raises:
        ProConError: naming the first package that is missing, and the extra.
    """
    for package in EXTRAS[extra]:
        if find_spec(package) is None:
            # No ImportError, after which axolotl, for one, would train without its plugin.
            raise ProConError(f"{for_} needs {package}, which is not installed: pip install 'procon-llm[{extra}]'")
    return extra
