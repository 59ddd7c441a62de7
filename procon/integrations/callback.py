"""A callback that constrains any framework which builds on transformers' Trainer and takes callbacks."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate.state import AcceleratorState, PartialState
from torch import nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from procon.constraint.guards import refuse_data_parallel, refuse_noise
from procon.directions import Directions
from procon.errors import ProConError
from procon.integrations.forward import REMEDY, ConstrainedForward, constrained_by
from procon.method import ProCon, Run, check_batches, makes_batches, once_through
from procon.method.procon import require_length
from procon.method.ranks import on_main
from procon.method.record import RECORD, write_record
from procon.schedule import AlphaSchedule
from procon.settings import ChatSettings, Fuse, ProConSettings, check_setting
from procon.training.checkpoints import open_checkpoint, seal
from procon.training.output import forget, locked, output_folder
from procon.training.run_facts import check_same_run, run_arguments, run_facts
from procon.version import __version__

logger = logging.getLogger(__name__)


class ProConCallback(TrainerCallback, ExportableState):
    """Constrains the training of any framework that builds on transformers' Trainer and takes callbacks::

        run_exp(args, callbacks=[ProConCallback("refusal-directions.safetensors", schedule="1@2ep,0")])

    As training begins it records anchors from the Trainer's own data and collator, and probes with its tokenizer, then
    trains through a :class:`ConstrainedForward`; as training ends the model is as it was. A training that an error
    ended leaves the model constrained, until it trains again or :meth:`detach` is called. A resumed training keeps the
    anchors of the one that it continues, which must still be where they were recorded, and its probes.

    A callback cannot lengthen the training, so the extra warm-up of ``"procon_wu"`` is refused: add its epochs to
    ``num_train_epochs``, and write it out as phases, ``"1@4ep,0"``.

    Logs ``procon/penalty`` (mean over the logging window, before alpha) and ``procon/alpha``, in ``state.log_history``
    and to the callbacks that come after this one. Trackers named in ``report_to`` come before: give
    ``report_to="none"`` and their callbacks after this one.

    Args:
        directions: of the model as training starts, or the file that they were saved in; extracted with the Trainer's
            tokenizer if not given.
        chat: how the model is asked.
        fuse: of :class:`procon.ProCon`.
        settings: of :class:`procon.ProConSettings`, by name.

    Attributes:
        procon: the method, while it trains and afterwards.

    Raises:
        ProConError: if the settings or the Trainer would lose the constraint.
    """

    def __init__(
        self,
        directions: Directions | str | Path | None = None,
        *,
        chat: ChatSettings | None = None,
        fuse: Fuse = "auto",
        **settings: Any,
    ) -> None:
        check_setting("fuse", fuse)
        self._settings = ProConSettings(**settings)
        schedule = AlphaSchedule.parse(self._settings.schedule)
        if schedule.extra:
            written_out = ",".join(map(str, schedule.phases))
            raise ProConError(
                f"schedule {self._settings.schedule!r} adds epochs of warm-up before those asked for, which a callback "
                f"cannot: give schedule={written_out!r} and add them to num_train_epochs"
            )
        if directions is not None and not isinstance(directions, Directions):
            directions = Directions.load(directions)
        self._directions = directions
        self._chat = chat
        self._fuse: Fuse = fuse
        self.procon: ProCon | None = None
        self._forward: ConstrainedForward | None = None
        self._lock = ExitStack()
        self._run: dict[str, Any] = {}

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, in ``trainer_state.json``: settings, where anchors are, what was done so far."""
        return {"args": {}, "attributes": self._facts()}

    def detach(self) -> None:
        """Leave the model as it was, after a training that an error ended."""
        self._lock.close()
        if self._forward is not None:
            self._forward.detach()

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if args.restore_callback_states_from_checkpoint:
            raise ProConError(
                "restore_callback_states_from_checkpoint makes new callbacks, without directions: leave it False; "
                "ProConCallback reads its own state"
            )

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        train_dataloader: DataLoader,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        left_over = constrained_by(model)
        if left_over is not None:
            left_over.detach()
        self._lock.close()
        self._lock.enter_context(locked(output_folder(args)))
        if state.global_step == 0:
            # What an earlier training has said of its own model.
            on_main(lambda: forget(output_folder(args)))
        if not AlphaSchedule.parse(self._settings.schedule).active:
            return
        _refuse(args, model)
        if self._settings.anchors == "recorded":
            require_length(train_dataloader.dataset, "training set")
        check_batches(makes_batches(train_dataloader), train_dataloader.dataset)
        # The Trainer starts over, for example with a smaller batch, and the model may have moved meanwhile.
        again = left_over is not None and left_over is self._forward and state.global_step == 0
        run = _CallbackRun(args, model, processing_class, self._chat)
        if again and self.procon is not None:
            procon = self.procon
            procon.run, procon.at_start = run, False
        else:
            procon = ProCon(run, settings=self._settings, directions=self._directions, fuse=self._fuse)
        self.procon = procon
        with _random_state_kept(args.device):
            self._run = _run(args, model, train_dataloader)
            if state.global_step > 0:
                self._resume(procon, args, state)
            elif not again:
                procon.find()
            procon.set_steps_per_epoch(max(1, -(-len(train_dataloader) // args.gradient_accumulation_steps)))
            procon.accumulation = args.gradient_accumulation_steps
            procon.check_acts(state.max_steps)
            procon.attach()
            self._forward = ConstrainedForward(procon)
            procon.record(lambda: _recording_loader(train_dataloader, args))
        self._forward.attach()
        procon.begin_run()
        logger.info(
            "alpha schedule %s over %d steps of %d epochs, %d steps each",
            procon.schedule,
            state.max_steps,
            state.num_train_epochs,
            procon.steps_per_epoch,
        )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._forward is not None:
            self._forward.begin_step(state.global_step)

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._forward is not None:
            self._forward.procon.evidence.next_micro_batch()

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
        if self._forward is not None:
            self._forward.end_step(optimizer, model)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._forward is not None:
            self._forward.procon.after_optimizer()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._forward is not None and control.should_save:
            self._forward.procon.penalty()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if self._forward is None or logs is None or "loss" not in logs:
            return
        found = self._forward.procon.log(state.global_step)
        logs.update(found)
        state.log_history[-1].update(found)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        folder = output_folder(args) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if self._forward is None or not folder.exists():
            return
        PartialState().wait_for_everyone()  # until every rank has written its files
        if args.should_save:
            self._forward.procon.save_files(folder)
            seal(folder, {**self._record(state), "resumable": not args.save_only_model})

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.detach()
        if self._forward is None:
            return
        procon, self._forward = self._forward.procon, None
        procon.penalty()
        procon.evidence.check_acted(state.global_step, procon.schedule)
        if args.should_save:
            procon.save_files(output_folder(args))
            write_record(output_folder(args), self._record(state))

    def _facts(self) -> dict[str, Any]:
        return {} if self.procon is None else {**self.procon.facts(), **self.procon.state(), **self._run}

    def _record(self, state: TrainerState) -> dict[str, Any]:
        did = self.procon.did(state.global_step) if self.procon else {}
        return {**self._facts(), "version": __version__, "constrained": did["constrained_steps"] > 0, "did": did}

    def _resume(self, procon: ProCon, args: TrainingArguments, state: TrainerState) -> None:
        # Annotated as a list of callbacks, of which TrainerState makes what each of them keeps.
        kept = cast("dict[str, Any] | None", state.stateful_callbacks)
        saved = (kept or {}).get(type(self).__name__)
        name = f"the checkpoint of step {state.global_step}"
        if saved is None or not saved["attributes"]:
            raise ProConError(
                f"{name} was trained without a constraint, so there are no anchors to go on with: start afresh from "
                "the model that is to be constrained"
            )
        record = saved["attributes"]
        check_same_run(record, self._run["run"], self._run["arguments"], name)
        folder = output_folder(args) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if (folder / RECORD).exists():
            on_main(lambda: open_checkpoint(folder).record)
        procon.find(folder, record)


class _CallbackRun(Run):
    """A training of which a callback knows the arguments and the model."""

    def __init__(self, args: TrainingArguments, model: nn.Module, tokenizer: Any, chat: ChatSettings | None) -> None:
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        progress = not args.disable_tqdm and PartialState().is_main_process
        super().__init__(model, tokenizer, chat=chat, folder=output_folder(args), progress=progress)
        self._device = args.device

    @property
    def device(self) -> torch.device:
        return self._device

    def autocast(self) -> AbstractContextManager[Any]:
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(AcceleratorState().mixed_precision)
        return nullcontext() if dtype is None else torch.autocast(self._device.type, dtype)


def _refuse(args: TrainingArguments, model: nn.Module) -> None:
    refuse_data_parallel(args.n_gpu)
    refuse_noise(args.neftune_noise_alpha)
    if (getattr(model, "tp_size", None) or 1) > 1:
        raise ProConError(
            "the model is split by tensor parallelism, whose ranks share batches: train with DDP, FSDP or DeepSpeed"
        )
    if args.label_smoothing_factor:
        raise ProConError(
            "label_smoothing_factor makes a loss of its own, in which the model's, and with it the constraint, is "
            f"lost: set it to 0, or {REMEDY}"
        )


def _run(args: TrainingArguments, model: nn.Module, loader: DataLoader) -> dict[str, Any]:
    precision = AcceleratorState().mixed_precision
    return {
        "run": run_facts(args, model, loader.dataset, precision=precision, reads_data=True),
        "arguments": run_arguments(args, model, data_collator=loader.collate_fn),
    }


def _recording_loader(loader: DataLoader, args: TrainingArguments) -> DataLoader:
    """This rank's share of what ``loader`` draws from, whole: training may drop other samples in each epoch."""
    size = args.per_device_train_batch_size
    return once_through(loader.dataset, loader.collate_fn, size, rank=args.process_index, ranks=args.world_size)


@contextmanager
def _random_state_kept(device: torch.device) -> Iterator[None]:
    """A dataset or a collator may draw from it; the training that follows must not notice."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
