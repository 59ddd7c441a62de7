"""The strength of the constraint in a training: of a schedule, or one that sets itself."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import TrainingArguments
from transformers.trainer_utils import has_length

from procon.errors import ProConError
from procon.training.anchored import AnchoredMixin
from procon.training.checkpoints import Checkpoint
from procon.training.hold import Hold
from procon.training.watch import check_acts, check_batches, check_probes_act


class StrengthMixin(AnchoredMixin):
    """Alpha at each optimiser step, and the training's length, which a warm-up adds to.

    Attributes:
        hold: what sets alpha; None if the schedule does.
    """

    hold: Hold | None
    _steps_per_epoch: int
    _resumed: Checkpoint | None

    @property
    def alpha(self) -> float:
        """Strength of the constraint at the current optimiser step; if it sets itself, this waits for the device."""
        return float(self._strength())

    @property
    def has_alpha(self) -> bool:
        """Whether alpha is above 0 at the current optimiser step; waits for nothing."""
        return self.hold is not None or self.alpha > 0

    def _strength(self, device: torch.device | None = None) -> float | Tensor:
        """Alpha without waiting for the device: a scalar there if it sets itself."""
        if self.hold is not None:
            return self.hold.alpha if device is None else self.hold.alpha.to(device)
        return self.alpha_schedule.alpha(self.state.global_step, self._steps_per_epoch)

    @property
    def _probe_weight(self) -> float | Tensor:
        """The probes' weight, which alpha multiplies. An alpha that answers to the training tokens alone says nothing
        of the probes: they keep the strength that it begins with."""
        settings = self.args.anchor_settings()
        if self.hold is None or settings.measured != "tokens":
            return settings.probe_weight
        return settings.probe_weight / self.hold.grown

    def set_initial_training_values(
        self, args: TrainingArguments, dataloader: DataLoader
    ) -> tuple[int, int, int, int, int, int | None, int]:
        """The training's length, with the schedule's extra warm-up added before it."""
        epochs, per_epoch, examples, samples, batch_size, steps_in_epoch, max_steps = (
            super().set_initial_training_values(args, dataloader)
        )
        self._steps_per_epoch = per_epoch
        self._check_resumed_schedule()
        extra = self.alpha_schedule.extra_steps(per_epoch)
        if extra:
            samples += extra * batch_size
            max_steps += extra
            epochs = -(-max_steps // per_epoch)
        if self.alpha_schedule.active:
            check_batches(not has_length(dataloader) or len(dataloader) > 0, self.train_dataset)
            check_acts(self.alpha_schedule, max_steps, per_epoch)
            check_probes_act(self.args.anchor_settings(), max_steps, self.model)
        return epochs, per_epoch, examples, samples, batch_size, steps_in_epoch, max_steps

    def _check_resumed_schedule(self) -> None:
        """Another number of ranks goes on as the interrupted run would have, if its steps are as large."""
        before = self._resumed.record.get("steps_per_epoch") if self._resumed else None
        now = self._steps_per_epoch
        if before is None or all(phase.steps(before) == phase.steps(now) for phase in self.alpha_schedule.phases):
            return
        raise ProConError(
            f"the checkpoint was trained with {before} steps per epoch, not {now}, and the schedule counts in epochs: "
            "keep ranks times batch size times gradient accumulation steps as it was"
        )

    def _alpha_of_last_step(self) -> float:
        if self.hold is not None:
            return self.alpha  # until the next step begins
        return self.alpha_schedule.alpha(max(self.state.global_step - 1, 0), self._steps_per_epoch)

    def _sum_over_ranks(self, tensor: Tensor) -> Tensor:
        """The sum of a scalar; on the way, in the same call, the shift that alpha has yet to answer to."""
        if self.hold is None or not self.hold.due:
            # Of a mapping, accelerate would make a mapping.
            return cast(Tensor, self.accelerator.reduce(tensor, "sum"))
        # Each rank of tensor parallelism has the shift of the whole batch.
        both = torch.stack([tensor, self.hold.measured / self.get_tp_size()])
        total, shift = cast(Tensor, self.accelerator.reduce(both, "sum"))
        self.hold.step(shift.sqrt() if self._measures_squares else shift)
        return total

    @property
    def _measures_squares(self) -> bool:
        """Whether a step's measure is a mean square: the probes' penalty always is squared."""
        return self.args.procon_penalty == "squared" or self.args.anchor_settings().measured == "probes"

    def _answer(self) -> None:
        """Have alpha answer to the last step, if no sum over the ranks has taken its shift along."""
        if self.hold is not None and self.hold.due:
            self._sum_over_ranks(torch.zeros_like(self.hold.measured))
