"""When ``procon train`` evaluates and saves, if nothing else is said: what follows from there being evaluation data."""

from __future__ import annotations

import argparse
from collections.abc import Container
from typing import Any

#: Settings that say what is evaluated on.
SOURCES = ("eval_data", "eval_split", "eval_share")


def evaluation_defaults(read: argparse.Namespace, given: Container[str]) -> dict[str, Any]:
    """Defaults of training arguments, once the settings are read: when to evaluate, and when to save.

    Args:
        given: names of the settings that were given.
    """
    found: dict[str, Any] = {}
    strategy = getattr(read.eval_strategy, "value", read.eval_strategy)
    if "eval_strategy" not in given and any(getattr(read, name) for name in SOURCES):
        found["eval_strategy"] = strategy = "steps" if "eval_steps" in given else "epoch"
    if strategy == "no":
        return found
    stops = read.early_stopping_patience > 0
    if stops and "load_best_model_at_end" not in given:
        found["load_best_model_at_end"] = True
    if stops or read.load_best_model_at_end:
        # The best checkpoint is among those that are saved.
        if "save_strategy" not in given:
            found["save_strategy"] = strategy
        if strategy == "steps" and "save_steps" not in given:
            found["save_steps"] = read.eval_steps or read.logging_steps
    return found
