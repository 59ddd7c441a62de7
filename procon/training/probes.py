"""Callbacks that probe the model during training, so that safety and skill can be watched step by step."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback

from procon.directions import ContrastMeans, RefusalDirections
from procon.drift import measure_drift
from procon.errors import ProConError
from procon.evaluation import evaluate
from procon.prompts import ContrastPrompts, builtin_prompts


class ProbeCallback(TrainerCallback, ABC):
    """Logs :meth:`measure` through ``trainer`` every ``every`` optimiser steps, and after the last one.

    Attributes:
        seconds: wall-clock time spent on measuring so far, to be told from the time spent on training.
    """

    def __init__(self, trainer: Trainer, tokenizer: PreTrainedTokenizerBase, every: int):
        if every < 1:
            raise ProConError(f"every is {every}: give a number of optimiser steps, 1 or more")
        self.trainer = trainer
        self.tokenizer = tokenizer
        self.every = every
        self.seconds = 0.0

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            began, should_log = time.monotonic(), control.should_log
            self.trainer.log(self.measure())
            # Logging cleared it, and with it the Trainer's own log of this step.
            control.should_log = should_log
            self.seconds += time.monotonic() - began

    @abstractmethod
    def measure(self) -> dict[str, float]:
        """Names and values to log."""


class DriftCallback(ProbeCallback):
    """Logs ``procon/drift_cos``: the mean signed cosine of re-extracted directions to those at the start.

    Args:
        prompts: probe prompts, 64 built-in pairs if not given. The reference is extracted from the same prompts when
            training starts, and kept in the output folder: a resumed run is measured against the same start.
    """

    def __init__(
        self,
        trainer: Trainer,
        tokenizer: PreTrainedTokenizerBase,
        *,
        every: int = 50,
        prompts: ContrastPrompts | None = None,
    ):
        super().__init__(trainer, tokenizer, every)
        self.prompts = prompts or builtin_prompts("extraction").first(64)
        self._reference: RefusalDirections | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        path = Path(args.output_dir) / "drift-reference.safetensors"
        if state.global_step > 0:
            self._reference = RefusalDirections.load(path)
            return
        means = ContrastMeans.measure(self.trainer.model, self.tokenizer, self.prompts, progress=False)
        self._reference = means.directions()
        if args.should_save:
            self._reference.save(path)
        self.trainer.log(self._logs(self._reference.cosine(self._reference)))

    def measure(self) -> dict[str, float]:
        drift = measure_drift(self.trainer.model, self.tokenizer, self._reference, self.prompts, progress=False)
        return self._logs(drift.cosine)

    @staticmethod
    def _logs(cosine: Tensor) -> dict[str, float]:
        return {"procon/drift_cos": float(torch.nanmean(cosine))}


class EvaluationCallback(ProbeCallback):
    """Logs ``procon/refusal_malicious``, ``procon/refusal_benign`` and, with a task, ``procon/task``.

    Args:
        prompts: contrast prompts, 24 built-in validation pairs if not given: keep held-out ones for the end.
        task: rows ``{"instruction", "output"}`` that are not trained on.
        max_new_tokens, task_max_new_tokens: lengths of the replies, as in :func:`procon.evaluation.evaluate`.
    """

    def __init__(
        self,
        trainer: Trainer,
        tokenizer: PreTrainedTokenizerBase,
        *,
        every: int = 50,
        prompts: ContrastPrompts | None = None,
        task: Sequence[dict] | None = None,
        max_new_tokens: int = 24,
        task_max_new_tokens: int = 64,
    ):
        super().__init__(trainer, tokenizer, every)
        self.prompts = prompts or builtin_prompts("validation").first(24)
        self.task = task
        self.max_new_tokens = max_new_tokens
        self.task_max_new_tokens = task_max_new_tokens

    def measure(self) -> dict[str, float]:
        found = evaluate(
            self.trainer.model,
            self.tokenizer,
            prompts=self.prompts,
            task=self.task,
            max_new_tokens=self.max_new_tokens,
            task_max_new_tokens=self.task_max_new_tokens,
            progress=False,
        )
        logs = {
            "procon/refusal_malicious": found.refusal_malicious.value,
            "procon/refusal_benign": found.refusal_benign.value,
        }
        return logs if found.task is None else {**logs, "procon/task": found.task.value}
