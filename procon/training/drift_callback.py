"""Drift during training: the directions re-extracted every so many steps."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback

from procon.directions import ContrastMeans
from procon.drift import measure_drift
from procon.prompts import ContrastPrompts, builtin_prompts


class DriftCallback(TrainerCallback):
    """Logs ``procon/drift_cos``, the mean signed cosine to the directions at the start of training.

    Args:
        trainer: the trainer to log to.
        tokenizer: the model's tokenizer.
        every: optimiser steps between two measurements; the last step is measured too.
        prompts: probe prompts; 64 built-in pairs if not given.

    The reference is extracted from the same prompts when training starts; a resumed run takes it from the checkpoint.
    """

    def __init__(
        self,
        trainer: Trainer,
        tokenizer: PreTrainedTokenizerBase,
        *,
        every: int = 50,
        prompts: ContrastPrompts | None = None,
    ):
        self.trainer = trainer
        self.tokenizer = tokenizer
        self.every = every
        self.prompts = prompts or builtin_prompts("extraction").first(64)
        self.reference = ContrastMeans.measure(trainer.model, tokenizer, self.prompts, progress=False).directions()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            drift = measure_drift(self.trainer.model, self.tokenizer, self.reference, self.prompts, progress=False)
            self.trainer.log({"procon/drift_cos": drift.mean_cosine})
