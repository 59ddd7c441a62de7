"""Settings of ``procon train`` that contradict each other: found before data or a model are read."""

from __future__ import annotations

import os
from typing import Any

from procon.cli.arguments import TrainArguments
from procon.cli.evaluation import SOURCES
from procon.errors import ProConError

#: Settings of a new adapter.
OF_ADAPTERS = ("lora_r", "lora_alpha", "lora_targets", "lora_dropout", "use_dora", "use_rslora", "modules_to_save")


def check(arguments: TrainArguments, config: Any) -> None:
    """Raise ProConError for settings that contradict each other; ``config`` has those of transformers."""
    _check_adapter(arguments)
    _check_evaluation(arguments, config)


def _check_adapter(arguments: TrainArguments) -> None:
    bits = next((name for name in ("load_in_4bit", "load_in_8bit") if getattr(arguments, name)), None)
    if arguments.method == "full":
        if bits:
            raise ProConError(f"{bits} is set, and quantised weights do not train: take --method lora")
        for name in ("merge", *OF_ADAPTERS):
            if name in arguments.given:
                raise ProConError(f"{name} is of an adapter, and method is 'full': leave it out, or take --method lora")
    if bits and arguments.accelerate_config in ("fsdp2", "zero3"):
        raise ProConError(
            f"{bits} is set, and accelerate_config {arguments.accelerate_config!r} would take quantised weights apart: "
            "take ddp or zero2, or leave the bits out"
        )
    if arguments.merge and bits:
        raise ProConError(
            f"merge and {bits} are both set, and an adapter merged into rounded weights is another model: leave "
            "--merge out, and merge into the base in full precision if you want to"
        )


def _check_evaluation(arguments: TrainArguments, config: Any) -> None:
    sources = [name for name in SOURCES if getattr(arguments, name)]
    if "eval_share" in sources and len(sources) > 1:
        raise ProConError(f"eval_share and {sources[0]} are both set: choose one")
    source = arguments.eval_data or arguments.data
    if arguments.eval_split and os.path.isfile(source):
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
