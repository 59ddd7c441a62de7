"""``procon.json``: what stands beside a model about the training that it comes from."""

from __future__ import annotations

import json
from collections.abc import Mapping
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


def check_resumed(
    found: Mapping[str, Any], expected: Mapping[str, Any], checkpoint: str, remedies: Mapping[str, str] | None = None
) -> None:
    """Raise ProConError unless the settings of an interrupted training are those of the one that goes on.

    Args:
        found: what the checkpoint keeps.
        expected: what this training has, of all settings that must be the same.
        checkpoint: what the message calls it.
        remedies: by setting, what to do in place of giving the same one.
    """
    for name, value in expected.items():
        if found.get(name) != value:
            remedy = (remedies or {}).get(name, "resume with the same settings")
            raise ProConError(
                f"{checkpoint} was trained with {name} {found.get(name)!r}, not {value!r}: {remedy}, or start afresh"
            )
