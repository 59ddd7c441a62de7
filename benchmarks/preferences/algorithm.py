"""What DPO and GRPO have in common here: a trainer of TRL, ours that extends it, a recipe, and data of our own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from peft import PeftModel
from transformers import Trainer, TrainingArguments

from benchmarks.study.earlier_settings import settings_now
from benchmarks.study.methods import Method, choose_directions
from benchmarks.study.start import Start
from procon.demo import Problem

#: Of each training, whatever the algorithm.
_SHARED = {
    "lr_scheduler_type": "cosine",
    "warmup_steps": 5,
    "logging_steps": 5,
    "bf16": False,  # no autocast: the model is loaded in what the machine multiplies
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
}


@dataclass(frozen=True)
class Algorithm:
    """One of TRL's trainers.

    Attributes:
        name: in file names.
        label: in texts.
        plain, constrained: the trainer with its configuration: TRL's, and ours.
        recipe: the same for all methods; what is not in it is TRL's default.
        data: trainer arguments from the start, the problems to train on and held-out ones.
        asked: the problems as they are put to a trained model.
        reply_tokens: longest reply to one.
        logged: what run files keep of the log, beside the constraint's own.
    """

    name: str
    label: str
    plain: tuple[type[Trainer], type[TrainingArguments]]
    constrained: tuple[type[Trainer], type[TrainingArguments]]
    recipe: dict[str, Any]
    data: Callable[[Start, Sequence[Problem], Sequence[Problem]], dict[str, Any]]
    asked: Callable[[Sequence[Problem]], list[Problem]]
    reply_tokens: int
    logged: tuple[str, ...]

    def trainer(
        self,
        model: PeftModel,
        method: Method,
        start: Start,
        *,
        train: Sequence[Problem],
        held_out: Sequence[Problem],
        **settings: Any,
    ) -> Trainer:
        """The trainer of ``method``, TRL's own if that has no constraint."""
        is_plain = method.defence == "plain"
        trainer, arguments = self.plain if is_plain else self.constrained
        more = {} if is_plain else {"directions": choose_directions(method, start)}
        # Named, as run files that say nothing else were made with it.
        anchors = {} if is_plain else {"procon_anchors": "live", "procon_probe_count": 8}
        recipe = {**_SHARED, **anchors, **self.recipe, **settings, **method.config}
        recipe["max_steps"] = round(recipe["max_steps"] * method.length)
        if not is_plain:
            recipe = settings_now(recipe, recipe["output_dir"])
        return trainer(
            model,
            args=arguments(**recipe),
            processing_class=start.tokenizer,
            **self.data(start, train, held_out),
            **more,
        )

    def history(self, trainer: Trainer) -> list[dict[str, float]]:
        """The rows of the trainer's log on training, rounded."""
        return [
            {
                key: float(f"{float(value):.4g}")
                for key, value in row.items()
                if key in ("step", *self.logged) or key.startswith("procon/")
            }
            for row in trainer.state.log_history
            if "loss" in row
        ]
