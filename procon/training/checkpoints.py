"""What a checkpoint must say, so that a resumed run is the run that was interrupted."""

from __future__ import annotations

import json
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from procon.directions import RefusalDirections
from procon.errors import ProConError

#: The directions of a run, beside its settings.
DIRECTIONS = "refusal-directions.safetensors"

_SETTINGS = "procon.json"
_TRAINER_STATE = "trainer_state.json"


def write_settings(checkpoint: Path, settings: dict, directions: RefusalDirections | None) -> None:
    """Put the constraint's settings and directions in a checkpoint folder that is about to be filled."""
    checkpoint.mkdir(parents=True, exist_ok=True)
    if directions is not None:
        directions.save(checkpoint / DIRECTIONS)
    (checkpoint / _SETTINGS).write_text(json.dumps(settings, indent=2))


def read_settings(checkpoint: Path) -> dict:
    """The settings that a checkpoint was trained with.

    Raises:
        ProConError: if it is not a complete checkpoint of ProCon.
    """
    if not _is_complete(checkpoint):
        raise ProConError(f"{str(checkpoint)!r} is not a complete checkpoint of ProCon: resume from another, or afresh")
    return json.loads((checkpoint / _SETTINGS).read_text())


def last_complete(output_dir: str | Path) -> Path | None:
    """The latest checkpoint under ``output_dir`` that was written to its end; a killed run may leave half of one."""
    found = [path for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.split("-")[-1].isdigit()]
    complete = [path for path in found if _is_complete(path)]
    return max(complete, key=lambda path: int(path.name.split("-")[-1]), default=None)


def _is_complete(checkpoint: Path) -> bool:
    try:
        # The Trainer writes its state last, so where that is whole, the rest is too.
        json.loads((checkpoint / _TRAINER_STATE).read_text())
        json.loads((checkpoint / _SETTINGS).read_text())
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return False
    return True
