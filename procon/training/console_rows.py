"""What is logged, on the console: rows of names and numbers that fit 80 columns, in place of dictionaries."""

from __future__ import annotations

from collections.abc import Mapping
from textwrap import wrap
from typing import Any

from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

_WIDTH = 80

#: Shorter names, and their order; others follow under their own.
_NAMES = {
    "loss": "loss",
    "eval_loss": "eval loss",
    "procon/penalty": "penalty",
    "procon/alpha": "alpha",
    "procon/shift": "shift",
    "procon/drift_cos": "drift cosine",
    "procon/drift_shift_malicious": "malicious",
    "procon/drift_shift_benign": "benign",
    "procon/drift_gate": "below the gate",
    "procon/refusal_malicious": "refusal of malicious",
    "procon/refusal_benign": "of benign",
    "procon/task": "task",
    "train_loss": "mean loss",
    "train_runtime": "seconds of training",
    "step_seconds": "seconds per step",
    "step_cpu_seconds": "CPU seconds per step",
    "probe_seconds": "seconds of probes",
    "evaluation_seconds": "of evaluation",
    "grad_norm": "grad norm",
    "learning_rate": "lr",
    "epoch": "epoch",
}

#: What follows from the rest, or says little.
_LEFT_OUT = {"step", "total_flos", "train_samples_per_second", "train_steps_per_second"}


def row(step: int, logs: Mapping[str, Any]) -> str:
    """One row of a log, in as many lines of 80 columns as it needs."""
    order = [name for name in _NAMES if name in logs]
    order += [name for name in logs if name not in _NAMES and name not in _LEFT_OUT]
    head = f"step {step:<5}"
    # Names and numbers stay together: no line breaks at this space.
    parts = [f"{_NAMES.get(name, name)} {_number(logs[name])}".replace(" ", "\0") for name in order]
    lines = wrap("  ".join(parts), _WIDTH - len(head) - 1, break_long_words=False, break_on_hyphens=False)
    return "\n".join(f"{head if place == 0 else ' ' * len(head)} {line}" for place, line in enumerate(lines)).replace(
        "\0", " "
    )


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class RowsBesideBar(ProgressCallback):
    """transformers' progress bar, with rows above it."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero and self.training_bar is not None and logs:
            self.training_bar.write(row(state.global_step, logs))


class Rows(PrinterCallback):
    """Rows alone."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero and logs:
            print(row(state.global_step, logs))


def show_rows(trainer: Trainer) -> None:
    """Have ``trainer`` print rows in place of dictionaries."""
    for before, after in ((ProgressCallback, RowsBesideBar), (PrinterCallback, Rows)):
        if trainer.pop_callback(before) is not None:
            trainer.add_callback(after)
