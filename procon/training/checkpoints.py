"""What is written beside a model: how it was constrained, and for a checkpoint, what a resumed run must match."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from transformers import TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from procon.directions import DIRECTIONS, RefusalDirections
from procon.errors import ProConError
from procon.files import save_json

_SETTINGS = "procon.json"
_TRAINER_STATE = "trainer_state.json"


def output_folder(args: TrainingArguments) -> Path:
    """The run's own folder."""
    # None is what they may be made with: they then name one themselves.
    return Path(cast(str, args.output_dir))


def write_settings(folder: Path, settings: dict[str, Any], directions: RefusalDirections) -> None:
    """Put the constraint's settings and directions beside a model."""
    directions.save(folder / DIRECTIONS)
    save_json(settings, folder / _SETTINGS)


def read_settings(checkpoint: Path) -> dict[str, Any]:
    """The settings that a checkpoint was trained with.

    Raises:
        ProConError: if it is not a complete checkpoint, or one of training without the constraint.
    """
    if not _is_complete(checkpoint):
        raise ProConError(f"{str(checkpoint)!r} is not a complete checkpoint: resume from another, or start afresh")
    try:
        return json.loads((checkpoint / _SETTINGS).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        raise ProConError(
            f"checkpoint {str(checkpoint)!r} is of training without the constraint: resume with procon_schedule 0, or "
            "start afresh"
        ) from None


def last_complete(output_dir: str | Path) -> Path | None:
    """The latest checkpoint under ``output_dir`` that was written to its end; a killed run may leave half of one."""
    found = [path for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.split("-")[-1].isdigit()]
    complete = [path for path in found if _is_complete(path)]
    return max(complete, key=lambda path: int(path.name.split("-")[-1]), default=None)


def _is_complete(checkpoint: Path) -> bool:
    try:
        # The Trainer writes its state last, so if that is whole, the rest is too.
        json.loads((checkpoint / _TRAINER_STATE).read_text())
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return False
    return True
