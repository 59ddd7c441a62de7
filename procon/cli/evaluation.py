"""The data that ``procon train`` evaluates on while training, and what follows from them for its settings."""

from __future__ import annotations

import argparse
from collections.abc import Container
from pathlib import Path
from typing import Any

from procon.cli.arguments import TrainArguments
from procon.errors import ProConError

_SOURCES = ("eval_data", "eval_split", "eval_share")


def evaluation_defaults(read: argparse.Namespace, given: Container[str]) -> dict[str, Any]:
    """Defaults of training arguments, once the settings are read: when to evaluate, and when to save.

    Args:
        given: names of the settings that were given.
    """
    found: dict[str, Any] = {}
    strategy = getattr(read.eval_strategy, "value", read.eval_strategy)
    if "eval_strategy" not in given and any(name in given for name in _SOURCES):
        found["eval_strategy"] = strategy = "steps" if "eval_steps" in given else "epoch"
    stops = read.early_stopping_patience > 0
    if stops and "load_best_model_at_end" not in given:
        found["load_best_model_at_end"] = True
    if strategy != "no" and (stops or read.load_best_model_at_end):
        # The best checkpoint is among those that are saved.
        if "save_strategy" not in given:
            found["save_strategy"] = strategy
        if strategy == "steps" and "save_steps" not in given:
            found["save_steps"] = read.eval_steps or read.logging_steps
    return found


def check_evaluation(arguments: TrainArguments, config: Any) -> None:
    """Raise ProConError for settings of evaluation that contradict each other, before any data are read."""
    sources = [name for name in _SOURCES if getattr(arguments, name)]
    if "eval_share" in sources and len(sources) > 1:
        raise ProConError(f"eval_share and {sources[0]} are both set: choose one")
    source = arguments.eval_data or arguments.data
    if arguments.eval_split and Path(source).is_file():
        raise ProConError(f"eval_split is {arguments.eval_split!r:.60}, and data {source!r} is a file: leave it out")
    asked = {
        "eval_strategy": str(getattr(config.eval_strategy, "value", config.eval_strategy)) != "no",
        "load_best_model_at_end": config.load_best_model_at_end,
        "early_stopping_patience": arguments.early_stopping_patience > 0,
    }
    for name, value in asked.items():
        if value and not sources:
            raise ProConError(f"{name} is set, and there is nothing to evaluate on: give --eval_data or --eval_share")
    if sources and not asked["eval_strategy"]:
        raise ProConError(f"{sources[0]} is set, and eval_strategy is 'no': leave one of them out")
    if (metric := config.metric_for_best_model) not in (None, "loss", "eval_loss"):
        raise ProConError(
            f"metric_for_best_model is {metric!r:.60}, and procon train measures the loss alone: leave it out"
        )
    if asked["early_stopping_patience"] and not config.load_best_model_at_end:
        raise ProConError(
            "early_stopping_patience is set and load_best_model_at_end is false, so the last checkpoint would be kept "
            "in place of the best: leave one of them out"
        )
