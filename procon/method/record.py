"""``procon.json``: what stands beside a model about the training that it comes from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from procon.errors import ProConError
from procon.files import json_checksum, save_json

RECORD = "procon.json"


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Put the record beside a model, with a checksum of its own."""
    save_json({**record, "checksum": json_checksum(json.loads(json.dumps(record)))}, folder / RECORD)


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record in ``folder``; None if there is none.

    Raises:
        ProConError: if it is damaged.
    """
    path = folder / RECORD
    try:
        record = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise ProConError(f"{str(path)!r} is damaged ({error}): take another checkpoint, or start afresh") from error
    if not isinstance(record, dict) or record.pop("checksum", None) != json_checksum(record):
        raise ProConError(f"{str(path)!r} is damaged (its checksum differs): take another checkpoint, or start afresh")
    return record
