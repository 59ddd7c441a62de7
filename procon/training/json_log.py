"""The log of a run as a file of JSON lines."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import rewrite_logs

from procon.files import write_text
from procon.training.output import output_folder


class JsonlCallback(TrainerCallback):
    """Writes one line per log call: the step, and the values by the names that trackers show, such as ``train/loss``.

    The file is the run's: a resumed run goes on from what its checkpoint had logged, so no step stands in it twice.
    Values that are not finite are written as null.

    Args:
        path: the file; ``log.jsonl`` in the output folder if not given.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = Path(path) if path else None
        self._begun = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._begun = False

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        path = self.path or output_folder(args) / "log.jsonl"
        if self._begun:
            with path.open("a") as file:
                file.write(_line(state.log_history[-1]))
            return
        # All that this run and those it goes on from have logged, in place of what a killed one may have left.
        write_text("".join(map(_line, state.log_history)), path)
        self._begun = True


def _line(entry: dict[str, Any]) -> str:
    values = {name: value for name, value in entry.items() if name != "step"}
    values = {"step": entry["step"], **rewrite_logs(values)}
    finite = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in values.items()}
    return json.dumps(finite) + "\n"
