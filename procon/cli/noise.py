"""What other libraries say while a command runs: under their own names, beside the command's output, and less of it."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from procon.errors import printable, visible

#: What says nothing about the run: of a kernel for 4-bit weights on a CPU that is not asked for, of a machine without
#: a GPU, of memory that only a GPU needs.
_NOISE = (
    "Failed to load CPU gemm_4bit_forward from kernels-community",
    "Setting accelerator to CPU",
    "'pin_memory' argument is set as true but",
)

#: Below the level of every handler.
_UNHEARD = -1


@contextmanager
def others_apart() -> Iterator[None]:
    """Within the context, standard output is the command's own, and what libraries say is filtered.

    What they log of a model's own names has no commands to the terminal in it.
    """
    make = logging.getLogRecordFactory()

    def make_apart(*arguments: Any, **further: Any) -> logging.LogRecord:
        record = make(*arguments, **further)
        record.msg, record.args = visible(record.getMessage()), ()
        if any(noise in record.msg for noise in _NOISE):
            record.levelno = _UNHEARD
        _leave_standard_output(record.name)
        return record

    with warnings.catch_warnings():
        warnings.showwarning = show_warning
        logging.setLogRecordFactory(make_apart)
        try:
            yield
        finally:
            logging.setLogRecordFactory(make)


def _leave_standard_output(name: str) -> None:
    """Have a logger's handlers write to standard error, if they write to standard output."""
    logger: logging.Logger | None = logging.getLogger(name)
    while logger is not None:
        for handler in logger.handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream in (sys.stdout, sys.__stdout__):
                handler.setStream(sys.stderr)
        logger = logger.parent if logger.propagate else None


def show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """In place of ``warnings.showwarning``: one line, under the name of the package that warns."""
    text = " ".join(printable(str(message)).split())
    for_users = issubclass(category, UserWarning) and not issubclass(category, FutureWarning | DeprecationWarning)
    if for_users and not any(noise in text for noise in _NOISE):
        print(f"{_who_warns()}: warning: {text}", file=sys.stderr)


def _who_warns() -> str:
    """The package of the code that called ``warnings.warn``, wherever it says that the cause lies."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__") in ("warnings", __name__):
        frame = frame.f_back
    return str(frame.f_globals.get("__name__", "python")).partition(".")[0] if frame else "python"
