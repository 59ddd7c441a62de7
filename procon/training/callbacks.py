"""Callbacks that probe the model during training, so that safety and skill can be watched step by step."""

from __future__ import annotations

import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from transformers import (
    PreTrainedModel,
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
from procon.evaluation import Drift, Evaluation, Judge, Metric, NothingFinished, evaluate, measure_drift
from procon.method.ranks import on_main
from procon.settings import ChatSettings, GateAction
from procon.training.console import leave_out_of_bar, log_apart, log_with_details, show_beside_bar
from procon.training.drift_gate import DriftGate
from procon.training.output import output_folder

logger = logging.getLogger(__name__)


class ProbeCallback(TrainerCallback, ABC):
    """Logs :meth:`measure` through ``trainer`` every ``steps`` optimiser steps, and after the last one.

    Attributes:
        chat: how the model is asked, as the trainer asks it if not given.
        seconds: wall-clock time spent on measuring in this training so far; not counted as time spent on training.
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

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.seconds = 0.0
        with self._aside():
            self.begin(args, state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step % self.steps == 0 or state.global_step == state.max_steps:
            should_log = control.should_log
            with self._aside():
                self.probe(state, control)
            # Logging cleared it, and with it the Trainer's own log of this step.
            control.should_log = should_log

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """Within the context, time counts as spent on measuring, and the progress bar says so."""
        began = time.monotonic()
        show_beside_bar(self.trainer, "measuring")
        yield
        seconds = time.monotonic() - began
        self.seconds += seconds
        leave_out_of_bar(self.trainer, seconds)

    @property
    def _model(self) -> PreTrainedModel:
        """The model that trains."""
        # With an adapter it is PEFT's, which takes from its base what it lacks.
        return cast(PreTrainedModel, self.trainer.model)

    def begin(self, args: TrainingArguments, state: TrainerState) -> None:
        """Before the first step."""

    def probe(self, state: TrainerState, control: TrainerControl) -> None:
        """Measure and log."""
        log_apart(self.trainer, self.measure())
        show_beside_bar(self.trainer, "")

    @abstractmethod
    def measure(self) -> dict[str, float]:
        """Names and values to log."""


class DriftCallback(ProbeCallback):
    """Extracts the directions again, and logs how far they and the prompts have moved since training started.

    - ``procon/drift_cos``: mean signed cosine to the first directions (paper section III-B).
    - ``procon/drift_cos_block/07``: the same at each block that has a direction; for trackers and files, not printed.
    - ``procon/drift_shift_malicious``, ``procon/drift_shift_benign``: mean shift of the prompts along the **first**
      directions, in units of their gap (see :class:`procon.evaluation.Drift`).
    - ``procon/drift_gate``: 1 if the mean cosine has just fallen below ``gate``.

    The mean cosine and the lowest block's stand beside the progress bar.

    A measurement costs one forward of the base decoder over each prompt, in batches of 32 and without gradients: four
    batches with the built-in prompts. Each rank computes it, and the main one's figures count for all.

    Args:
        steps: optimiser steps from one measurement to the next.
        prompts: probe prompts; if not given, 64 built-in pairs that are none of the probes that a trainer keeps. The
            reference is extracted from the same prompts when training starts, and kept in the output folder: a resumed
            run is measured against the same start.
        gate: a floor under the mean cosine, such as 0.9. At the first measurement below it, and again at the first
            below it after one above it, one warning is logged. A resumed run that is still below warns again.
        gate_action: ``"warn"``, or ``"stop"``: training ends after that step, and saves a checkpoint.

    Attributes:
        drift: what was measured last; None before training.

    Raises:
        ProConError: for a gate or an action that cannot be; when a run is resumed that has no reference.
    """

    _reference: Directions  # there from the beginning of training on

    def __init__(
        self,
        trainer: Trainer,
        tokenizer: PreTrainedTokenizerBase,
        *,
        steps: int = 50,
        prompts: ContrastPrompts | None = None,
        gate: float | None = None,
        gate_action: GateAction = "warn",
        chat: ChatSettings | None = None,
    ) -> None:
        super().__init__(trainer, tokenizer, steps, chat)
        self.prompts = prompts or builtin_drift_pairs()
        self.gate = DriftGate.parse(gate, gate_action)
        self.drift: Drift | None = None
        self._passed = True

    def begin(self, args: TrainingArguments, state: TrainerState) -> None:
        path = output_folder(args) / "drift-reference.safetensors"
        self._passed = True
        if state.global_step > 0:
            self._reference = self._reopen(path)
            return
        self._reference = on_main(self._extract, all_call=True)
        if args.should_save:
            self._reference.save(path)
        none = torch.where(self._reference.at_block_inputs.usable, 0.0, torch.nan)
        self.drift = Drift(cosine=none + 1, malicious_shift=none, benign_shift=none)
        self._show(_summary(self.drift), self.drift)

    def probe(self, state: TrainerState, control: TrainerControl) -> None:
        drift, gate = self._measure_drift(), self.gate
        logs = _summary(drift)
        passed = gate is None or gate.passes(drift)
        crossed = self._passed and not passed
        self._passed = passed
        self._show({**logs, "procon/drift_gate": 1.0} if crossed else logs, drift)
        if gate is None or not crossed:
            return
        if state.is_world_process_zero:
            logger.warning(gate.message(drift, state.global_step))
        if gate.action == "stop":
            control.should_training_stop = control.should_save = True

    def _extract(self) -> Directions:
        means = ContrastMeans.measure(self._model, self.tokenizer, self.prompts, chat=self.chat, progress=False)
        return replace(Directions.from_means(means), provenance=self._asked())

    def _asked(self) -> dict[str, Any]:
        """What is asked, and how: of the reference and of all that is compared with it."""
        return {"prompts": self.prompts.hash, "chat": describe_chat(self.tokenizer, self.chat)}

    def measure(self) -> dict[str, float]:
        return _summary(self._measure_drift())

    def _measure_drift(self) -> Drift:
        def measure() -> Drift:
            return measure_drift(
                self._model, self.tokenizer, self._reference, self.prompts, chat=self.chat, progress=False
            )

        # Ranks round differently, and one that stopped alone would leave the others waiting for it.
        self.drift = drift = on_main(measure, all_call=True)
        return drift

    def _reopen(self, path: Path) -> Directions:
        """The reference of the run that is resumed: the model that it started from is no longer there to measure."""
        found = on_main(lambda: Directions.load(path) if path.is_file() else None)
        if found is None:
            raise ProConError(
                f"there is no drift reference {str(path)!r}: the run that is resumed did not measure drift, or had "
                "another output folder; copy the file from there, or resume without DriftCallback (--drift_steps 0)"
            )
        if {"chat": describe_chat(None, None), **found.provenance} != self._asked():
            raise ProConError(
                f"drift reference {str(path)!r} was measured on other prompts, or asked in another way: resume with "
                "the prompts, system prompt and chat_template_kwargs that the run began with, or without DriftCallback "
                "(--drift_steps 0)"
            )
        return found

    def _show(self, logs: dict[str, float], drift: Drift) -> None:
        log_with_details(self.trainer, logs, _by_block(drift))
        block, lowest = drift.lowest
        # Short, since tqdm cuts what does not fit into 80 columns beside its own counts.
        show_beside_bar(self.trainer, f"drift cos {drift.mean_cosine:.3f}, block {block}: {lowest:.3f}")


def _summary(drift: Drift) -> dict[str, float]:
    return {
        "procon/drift_cos": drift.mean_cosine,
        "procon/drift_shift_malicious": float(torch.nanmean(drift.malicious_shift)),
        "procon/drift_shift_benign": float(torch.nanmean(drift.benign_shift)),
    }


def _by_block(drift: Drift) -> dict[str, float]:
    """The cosine at each block that has one, by names that sort."""
    # Not below `procon/drift_cos`: MLflow keeps each metric in a file of its name, which cannot be a folder too.
    digits = max(2, len(str(len(drift.cosine) - 1)))
    cosines = enumerate(drift.cosine.tolist())
    return {f"procon/drift_cos_block/{block:0{digits}}": value for block, value in cosines if not math.isnan(value)}


class EvaluationCallback(ProbeCallback):
    """Logs ``procon/refusal_malicious``, ``procon/refusal_benign`` and, with a task, ``procon/task``.

    Args:
        prompts: contrast prompts, 24 built-in validation pairs if not given: keep held-out ones for the end.
        task: rows ``{"instruction", "output"}`` that are not trained on.
        judge: who says whether a reply refuses, and ``metric``: when a task reply is right; as in
            :func:`procon.evaluation.evaluate`. A judge that is a model stays in memory while training runs.
        max_new_tokens, task_max_new_tokens: lengths of the replies, as in :func:`procon.evaluation.evaluate`.
    """

    def __init__(
        self,
        trainer: Trainer,
        tokenizer: PreTrainedTokenizerBase,
        *,
        steps: int = 50,
        prompts: ContrastPrompts | None = None,
        task: Sequence[dict[str, Any]] | None = None,
        judge: str | Judge | Sequence[Judge] | None = None,
        metric: str | Metric = "exact",
        max_new_tokens: int = 24,
        task_max_new_tokens: int = 64,
        chat: ChatSettings | None = None,
    ) -> None:
        super().__init__(trainer, tokenizer, steps, chat)
        self.prompts = prompts or builtin_prompts("validation").first(24)
        self.task = task
        self.judge, self.metric = judge, metric
        self.max_new_tokens = max_new_tokens
        self.task_max_new_tokens = task_max_new_tokens

    def measure(self) -> dict[str, float]:
        try:
            found = self._evaluate()
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

    def _evaluate(self) -> Evaluation:
        return evaluate(
            self._model,
            self.tokenizer,
            prompts=self.prompts,
            task=self.task,
            judge=self.judge,
            metric=self.metric,
            chat=self.chat,
            max_new_tokens=self.max_new_tokens,
            task_max_new_tokens=self.task_max_new_tokens,
            progress=False,
        )
