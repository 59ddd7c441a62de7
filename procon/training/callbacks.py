"""Callbacks that measure the model during training, so that safety and skill can be watched step by step."""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from transformers import (
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from procon.chat import ContrastPrompts, builtin_drift_pairs, builtin_prompts, describe_chat
from procon.directions import ContrastMeans, Directions
from procon.errors import ProConError
from procon.evaluation import Drift, NothingFinished, evaluate, measure_drift
from procon.ranks import on_main
from procon.settings import ChatSettings
from procon.training.run_folder import output_folder

logger = logging.getLogger(__name__)


class MeasuringCallback(TrainerCallback, ABC):
    """Logs :meth:`measure` through ``trainer`` every ``steps`` optimiser steps, and after the last one.

    Attributes:
        chat: how the model is asked, as the trainer asks it if not given.
        seconds: wall-clock time spent on measuring so far.
    """

    def __init__(
        self, trainer: Trainer, tokenizer: PreTrainedTokenizerBase, steps: int, chat: ChatSettings | None = None
    ) -> None:
        if steps < 1:
            raise ProConError(f"steps is {steps}: give a number of optimiser steps, 1 or more")
        self.trainer = trainer
        self.tokenizer = tokenizer
        self.steps = steps
        self.chat = chat or getattr(trainer, "chat", None)
        self.seconds = 0.0

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step % self.steps == 0 or state.global_step == state.max_steps:
            began = time.monotonic()
            logs = self.measure()
            self.seconds += time.monotonic() - began
            self._log(logs, control)

    def _log(self, logs: dict[str, float], control: TrainerControl) -> None:
        should_log = control.should_log
        # Not as subclasses do, which would take what they add, such as TRL's entropy, from the row of the loss.
        Trainer.log(self.trainer, logs)
        # Logging cleared it, and with it the Trainer's own log of this step.
        control.should_log = should_log

    @abstractmethod
    def measure(self) -> dict[str, float]:
        """Names and values to log."""


class DriftCallback(MeasuringCallback):
    """Extracts the directions again, and logs how far they and the prompts have moved since training started.

    - ``procon/drift_cos``: mean signed cosine to the first directions (paper section III-B).
    - ``procon/drift_cos_lowest``: the same at the block where it is lowest.
    - ``procon/drift_shift_malicious``, ``procon/drift_shift_benign``: mean shift of the prompts along the **first**
      directions, in units of their gap (see :class:`procon.evaluation.Drift`).

    A measurement costs one forward of the base decoder over each prompt, in batches of 32 and without gradients: four
    batches with the built-in prompts.

    Args:
        steps: optimiser steps from one measurement to the next.
        prompts: if not given, 64 built-in pairs that are none of the probes that a trainer keeps. The reference is
            extracted from them when training starts, and kept in the output folder: a resumed run is measured against
            the same start, and refused without it.

    Attributes:
        drift: what was measured last; None before training.
    """

    _reference: Directions  # there from the beginning of training on

    def __init__(
        self,
        trainer: Trainer,
        tokenizer: PreTrainedTokenizerBase,
        *,
        steps: int = 50,
        prompts: ContrastPrompts | None = None,
        chat: ChatSettings | None = None,
    ) -> None:
        super().__init__(trainer, tokenizer, steps, chat)
        self.prompts = prompts or builtin_drift_pairs()
        self.drift: Drift | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        began = time.monotonic()
        path = output_folder(args) / "drift-reference.procon"
        asked = {"prompts": self.prompts.hash, "chat": describe_chat(self.tokenizer, self.chat)}
        if state.global_step > 0:
            self._reference = on_main(lambda: _reopen(path, asked))
            return
        model: Any = self.trainer.model
        means = ContrastMeans.measure(model, self.tokenizer, self.prompts, chat=self.chat, progress=False)
        self._reference = replace(Directions.from_means(means), provenance=asked)
        if args.should_save:
            self._reference.save(path)
        none = torch.where(self._reference.usable, 0.0, torch.nan)
        self.drift = Drift(cosine=none + 1, malicious_shift=none, benign_shift=none)
        self.seconds += time.monotonic() - began
        self._log(_summary(self.drift), control)

    def measure(self) -> dict[str, float]:
        model: Any = self.trainer.model
        self.drift = measure_drift(model, self.tokenizer, self._reference, self.prompts, chat=self.chat, progress=False)
        return _summary(self.drift)


def _reopen(path: Path, asked: dict[str, Any]) -> Directions:
    """The reference of the run that is resumed: the model that it started from is no longer there to measure."""
    if not path.is_file() or (found := Directions.load(path)).provenance != asked:
        raise ProConError(
            f"there is no drift reference {str(path)!r} of these prompts, asked in this way: resume with the output "
            "folder, prompts, system prompt and chat_template_kwargs that the run began with, or without DriftCallback "
            "(--drift_steps 0)"
        )
    return found


def _summary(drift: Drift) -> dict[str, float]:
    return {
        "procon/drift_cos": drift.mean_cosine,
        "procon/drift_cos_lowest": drift.lowest[1],
        "procon/drift_shift_malicious": float(torch.nanmean(drift.malicious_shift)),
        "procon/drift_shift_benign": float(torch.nanmean(drift.benign_shift)),
    }


class EvaluationCallback(MeasuringCallback):
    """Logs ``procon/refusal_malicious``, ``procon/refusal_benign`` and, with a task, ``procon/task``.

    Args:
        prompts: contrast prompts, 24 built-in validation pairs if not given: keep held-out ones for the end.
        task: rows ``{"instruction", "output"}`` that are not trained on.
        settings: of :func:`procon.evaluation.evaluate`, such as ``judge``, ``metric`` and the lengths of the replies. A
            judge that is a model stays in memory while training runs.
    """

    def __init__(
        self,
        trainer: Trainer,
        tokenizer: PreTrainedTokenizerBase,
        *,
        steps: int = 50,
        prompts: ContrastPrompts | None = None,
        task: Sequence[dict[str, Any]] | None = None,
        chat: ChatSettings | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(trainer, tokenizer, steps, chat)
        self.prompts = prompts or builtin_prompts("validation").first(24)
        self._settings = {"task": task, "max_new_tokens": 24, "task_max_new_tokens": 64, **settings}
        signature(evaluate).bind_partial(**self._settings)  # a wrong name shows now, not in training

    def measure(self) -> dict[str, float]:
        model: Any = self.trainer.model
        asked = {"prompts": self.prompts, "chat": self.chat, "progress": False}
        try:
            found = evaluate(model, self.tokenizer, **asked, **self._settings)
        except NothingFinished as error:
            logger.warning(str(error))
            return {"procon/unfinished": 1.0}
        logs = {
            "procon/refusal_malicious": found.refusal_malicious.value,
            "procon/refusal_benign": found.refusal_benign.value,
        }
        if found.unfinished is not None and found.unfinished.hits:
            logs["procon/unfinished"] = found.unfinished.value
        return logs if found.task is None else {**logs, "procon/task": found.task.value}
