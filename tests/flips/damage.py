"""What is done to a file: one bit flipped, cut off, lengthened; and what comes of it."""

from __future__ import annotations

import logging
import random
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from procon.errors import ProConError

#: What may come of a damaged file, and what must not.
REFUSED, MENDED, HARMLESS = "refused", "mended or passed over, with a warning", "harmless"
WRONG, TRACEBACK = "silently wrong", "traceback"
OUTCOMES = (REFUSED, MENDED, HARMLESS, WRONG, TRACEBACK)


class _Told(logging.Handler):
    """What was logged as a warning."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def outcome(use: Callable[[], Any], expected: Any, instead: Any = None) -> str:
    """Of using what is damaged: only what equals ``expected`` bit by bit may come out of it, or ``instead``, told."""
    told, logger = _Told(), logging.getLogger("procon")
    logger.addHandler(told)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = use()
    except ProConError as error:
        # One line that names a file or folder, and a remedy.
        return REFUSED if "\n" not in str(error) and ": " in str(error) else TRACEBACK
    except Exception:
        traceback.print_exc()
        return TRACEBACK
    finally:
        logger.removeHandler(told)
    text = " ".join([*(str(warning.message) for warning in caught), *told.texts])
    if found != expected:
        return MENDED if instead is not None and found == instead and "passed over" in text else WRONG
    return MENDED if "damaged" in text or "checksum" in text else HARMLESS


def flips(data: bytes, start: int, stop: int, count: int, seed: str) -> Iterator[tuple[str, bytes]]:
    """``count`` different bits of ``data[start:stop]``, or all that there are, one flipped at a time."""
    places = range(start * 8, stop * 8)
    for place in random.Random(seed).sample(places, min(count, len(places))):
        changed = bytearray(data)
        changed[place // 8] ^= 1 << place % 8
        yield f"bit {place}", bytes(changed)


def cuts(data: bytes, count: int, seed: str) -> Iterator[tuple[str, bytes]]:
    """Cut off anywhere, at nothing and by a byte too, and lengthened."""
    lengths = [0, len(data) - 1, *random.Random(seed).sample(range(1, len(data) - 1), count - 2)]
    for length in lengths[:count]:
        yield f"cut to {length}", data[:length]
    for more in (b"\0", b"}", b"\n", data):
        yield f"lengthened by {len(more)}", data + more


class Damaged:
    """Within the context, a file has other content; after it, it and its folder are as they were."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._before = {path: path.read_bytes() for path in file.parent.iterdir() if path.is_file()}
        self.content = self._before[file]

    def __call__(self, content: bytes) -> Damaged:
        self._now = content
        return self

    def __enter__(self) -> None:
        self.file.write_bytes(self._now)

    def __exit__(self, *_: object) -> None:
        for path in self.file.parent.iterdir():
            if path not in self._before and path.is_file():
                path.unlink()
        for path, content in self._before.items():
            path.write_bytes(content)
