"""Looks on while a trainer trains: does every step that should be under the constraint have it?"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import has_length

from procon.errors import ProConError
from procon.models import token_embedding
from procon.schedule import AlphaSchedule
from procon.settings import AnchorSettings

if TYPE_CHECKING:
    from procon.training.mixin import ProConMixin

logger = logging.getLogger(__name__)

#: An alpha so small serves to log the penalty, and not to constrain.
_ONLY_MEASURES = 1e-6


class Watch(TrainerCallback):
    """Counts the steps of a constrained trainer, and stops one that loses the constraint."""

    def __init__(self, trainer: ProConMixin) -> None:
        self._trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._trainer.begin_evidence()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._trainer.evidence.begin_step()
        if self._trainer.constraint is not None:
            self._trainer.constraint.note_departures(state.global_step == 0)

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._trainer.evidence.next_micro_batch()

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        constraint = self._trainer.constraint
        if constraint is not None and self._trainer.has_alpha and self._trainer.constrains_this_step:
            each = self._trainer.args.anchor_settings().of_tokens is not None
            self._trainer.evidence.end_step(constraint, optimizer, model, each=each)


def check_batches(made: bool, dataset: Any) -> None:
    """Raise ProConError if a training made no batch of its data, or would make none."""
    if not made:
        rows = f"the {len(dataset)} rows of " if has_length(dataset) else ""
        raise ProConError(
            f"no batch was made of {rows}the training set: with dataloader_drop_last or sample packing, fewer (packed) "
            "rows than per_device_train_batch_size (axolotl: micro_batch_size) make none, so lower it or give more data"
        )


def check_acts(schedule: AlphaSchedule, steps: int, steps_per_epoch: int) -> None:
    """Look at a schedule before training; warn of an alpha or a phase that does nothing.

    Raises:
        ProConError: if none of the training's steps would be under the constraint.
    """
    if steps < 1:
        raise ProConError("the training has no steps: give num_train_epochs or max_steps above 0, and data")
    if not schedule.constrained_steps(steps, steps_per_epoch):
        raise ProConError(
            f"schedule {str(schedule)!r} has alpha 0 in each of the {steps} steps of this training "
            f"({steps_per_epoch} in an epoch), so nothing would be constrained: begin the constraint earlier, train "
            "longer, or give schedule '0' to train without it"
        )
    if steps > 1 and schedule.constrained_steps(steps, steps_per_epoch) == 1 and schedule.phases[0].alpha > 0:
        logger.warning(
            "schedule %s constrains the first of %d steps alone, when the model is still at its anchors, so it "
            "constrains next to nothing",
            schedule,
            steps,
        )
    strongest = max(phase.alpha for phase in schedule.phases)
    if strongest < _ONLY_MEASURES:
        logger.warning("alpha is at most %g: the penalty is logged, but constrains next to nothing", strongest)
    begin = 0.0
    for phase in schedule.phases:
        if begin >= steps:
            logger.warning(
                "phase %s of schedule %s is never reached: it begins after step %d, and training has %d steps",
                phase,
                schedule,
                begin,
                steps,
            )
        begin += phase.steps(steps_per_epoch)


def check_probes_act(anchors: AnchorSettings, steps: int, model: nn.Module) -> None:
    """Raise ProConError if probes are all that there is, and would not run at all; warn if training tokens are left.

    Warns of an adapter on the embeddings, too.
    """
    if anchors.has_probes and isinstance(token_embedding(model), BaseTunerLayer):
        # Of rows that probes alone reach, Adam makes whole steps however small their gradient is.
        logger.warning(
            "an adapter is on the embeddings, and probes may move what they should hold there, more than training "
            "without them would: leave the embeddings out of target_modules, or take procon_anchors 'recorded' or "
            "'live'"
        )
    if not anchors.has_probes or steps >= anchors.probe_every:
        return
    if anchors.of_tokens is None:
        raise ProConError(
            f"procon_probe_every is {anchors.probe_every}, more than all steps of training, {steps}, so the probes "
            "would never run: give a smaller number"
        )
    logger.warning(
        "procon_probe_every is %d, more than all steps of training, %d, so the probes never run",
        anchors.probe_every,
        steps,
    )
