"""How long an optimiser step takes, without what callbacks measure beside it."""

from __future__ import annotations

import time
from statistics import median
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from procon.training.callbacks import ProbeCallback
from procon.training.console import leave_out_of_bar

if TYPE_CHECKING:
    from transformers import Trainer

    _Trainer = Trainer
else:
    _Trainer = object


class StepTimes(TrainerCallback):
    """Times each optimiser step from its first forward to the end of the optimiser's work.

    Attributes:
        seconds: by the clock.
        cpu_seconds: of all threads of this process. On a CPU they are what a step costs, however busy the machine is.
        evaluation: seconds that evaluation took in this training so far.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        self.evaluation = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.seconds, self.cpu_seconds = [], []
        self.evaluation = 0.0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._began = time.monotonic(), time.process_time()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.seconds.append(time.monotonic() - self._began[0])
        self.cpu_seconds.append(time.process_time() - self._began[1])


class TimedMixin(_Trainer):
    """Before any subclass of transformers' Trainer: what it logs at the end counts training alone.

    - ``train_runtime``, and samples and steps per second, are without the time that :class:`ProbeCallback` took and
      that of evaluation, which stand beside them as ``probe_seconds`` and ``evaluation_seconds``.
    - ``step_seconds`` is the median time of an optimiser step; on a CPU, ``step_cpu_seconds`` the same in CPU time.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._step_times = StepTimes()
        self.add_callback(self._step_times)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        began = time.monotonic()
        try:
            return super().evaluate(*args, **kwargs)
        finally:
            seconds = time.monotonic() - began
            self._step_times.evaluation += seconds
            leave_out_of_bar(self, seconds)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "train_runtime" in logs:
            logs.update(self._times(logs))
        super().log(logs, *args, **kwargs)

    def _times(self, logs: dict[str, float]) -> dict[str, float]:
        callbacks = self.callback_handler.callbacks
        probing = sum(callback.seconds for callback in callbacks if isinstance(callback, ProbeCallback))
        evaluation = self._step_times.evaluation
        whole = logs["train_runtime"]
        training = whole - probing - evaluation
        found: dict[str, float] = {}
        if (probing or evaluation) and training > 0:
            found = {"train_runtime": round(training, 4)}
            found |= {"probe_seconds": round(probing, 4)} if probing else {}
            found |= {"evaluation_seconds": round(evaluation, 4)} if evaluation else {}
            for name in ("train_samples_per_second", "train_steps_per_second"):
                if name in logs:
                    found[name] = round(logs[name] * whole / training, 3)
        if self._step_times.seconds:
            found["step_seconds"] = round(median(self._step_times.seconds), 4)
            if self.args.device.type == "cpu":
                found["step_cpu_seconds"] = round(median(self._step_times.cpu_seconds), 4)
        return found
