"""Files that are whole or not there, and JSON in and out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from procon.errors import ProConError

T = TypeVar("T")


@contextmanager
def whole_file(target: Path, writer: int = 0) -> Iterator[Path]:
    """Within the context, write to the path that it gives; after it, that is ``target``, which is whole or not there.

    Args:
        target: its folder is made if need be.
        writer: number of the process that writes; no two that may write ``target`` at a time have the same.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.{writer}.partial")
    yield partial
    partial.replace(target)


def write_text(text: str, path: str | Path) -> Path:
    """Write ``text`` to ``path`` so that a reader finds the old file or the whole new one; returns the path."""
    path = Path(path)
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")
    return path


def save_json(data: dict[str, Any], path: str | Path) -> Path:
    """Write ``data`` as standard JSON (NaN is an error) in one step; returns the path."""
    return write_text(json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n", path)


def load_json(path: str | Path, build: Callable[[Any], T], what: str) -> T:
    """``build`` what :func:`save_json` wrote; ``what`` names it in messages.

    Raises:
        ProConError: if the file is missing or damaged, or ``build`` does not recognise its content.
    """
    path = Path(path)
    if not path.is_file():
        raise ProConError(f"{what} file {str(path)!r} does not exist")
    try:
        return build(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        reason = f"no key {error}" if isinstance(error, KeyError) else error
        raise ProConError(f"{what} file {str(path)!r} is damaged or holds something else ({reason})") from error
