"""A callback that constrains any framework which builds on transformers' Trainer and takes callbacks."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState, PartialState
from torch import nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from procon.anchors.starting_state import require_length
from procon.constraint.guards import refuse_data_parallel, refuse_noise
from procon.directions import Directions
from procon.errors import ProConError
from procon.integrations.forward import REMEDY, ConstrainedForward, constrained_by
from procon.method import ProCon, Run, check_batches, makes_batches, once_through
from procon.method.ranks import on_main
from procon.method.record import write_record
from procon.schedule import AlphaSchedule
from procon.settings import ChatSettings, Fuse, ProConSettings, check_setting
from procon.training.checkpoints import open_checkpoint, seal
from procon.training.output import forget, locked, output_folder
from procon.training.run_facts import check_same_run, run_arguments, run_facts
from procon.version import __version__


class ProConCallback(TrainerCallback):
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
        self._schedule = AlphaSchedule.parse(self._settings.schedule)
        if self._schedule.extra:
            written_out = ",".join(map(str, self._schedule.phases))
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

    def detach(self) -> None:
        """Leave the model as it was, after a training that an error ended."""
        self._lock.close()
        if self._forward is not None:
            self._forward.detach()

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: Any,
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
        if not self._schedule.active:
            return
        _refuse(args, model)
        loader = train_dataloader
        if self._settings.anchors == "recorded":
            require_length(loader.dataset, "training set")
        check_batches(makes_batches(loader), loader.dataset)
        run = _CallbackRun(args, model, processing_class, self._chat)
        # If the Trainer starts over, for example with a smaller batch, the model may have moved meanwhile.
        again = left_over is not None and left_over is self._forward and state.global_step == 0
        procon = self.procon if again else None
        if procon is None:
            procon = ProCon(run, settings=self._settings, directions=self._directions, fuse=self._fuse)
        self.procon, procon.run, procon.at_start = procon, run, not again
        with _random_state_kept(args.device):
            self._run = {
                "run": run_facts(args, model, loader.dataset, precision=run.precision, reads_data=True),
                "arguments": run_arguments(args, model, data_collator=loader.collate_fn),
            }
            if state.global_step > 0:
                folder = output_folder(args) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
                record = on_main(lambda: open_checkpoint(folder).record)
                check_same_run(record, self._run["run"], self._run["arguments"], f"checkpoint {str(folder)!r}")
                procon.find(folder, record)
            elif not again:
                procon.find()
            procon.set_steps_per_epoch(max(1, -(-len(loader) // args.gradient_accumulation_steps)))
            procon.accumulation = args.gradient_accumulation_steps
            procon.check_acts(state.max_steps)
            procon.attach()
            self._forward = ConstrainedForward(procon)
            # This rank's share of the data, whole: training may drop other samples in each epoch.
            size, rank, ranks = args.per_device_train_batch_size, args.process_index, args.world_size
            procon.record(lambda: once_through(loader.dataset, loader.collate_fn, size, rank=rank, ranks=ranks))
        self._forward.attach()
        procon.begin_run()

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if self._forward is not None:
            self._forward.begin_step(state.global_step)

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, *, model: nn.Module, optimizer: Any = None, **kwargs: Any
    ) -> None:
        if self._forward is not None:
            self._forward.end_step(optimizer, model)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._forward is not None:
            self._forward.procon.after_optimizer()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._forward is not None and control.should_save:
            self._forward.procon.penalty()

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self._forward is not None and logs is not None and "loss" in logs:
            found = self._forward.procon.log(state.global_step)
            logs.update(found)
            state.log_history[-1].update(found)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        folder = output_folder(args) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if self._forward is None or not folder.exists():
            return
        PartialState().wait_for_everyone()  # until every rank has written its files
        if args.should_save:
            self._forward.procon.save_files(folder)
            seal(folder, {**self._record(state), "resumable": not args.save_only_model})

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.detach()
        if self._forward is None:
            return
        procon, self._forward = self._forward.procon, None
        procon.penalty()
        procon.evidence.check_acted(state.global_step, procon.schedule)
        if args.should_save:
            procon.save_files(output_folder(args))
            write_record(output_folder(args), self._record(state))

    def _record(self, state: TrainerState) -> dict[str, Any]:
        assert self.procon is not None  # noqa: S101  # for the type checker: it trains, or has trained
        did = self.procon.did(state.global_step)
        found = {**self.procon.facts(), **self.procon.state(), **self._run, "did": did}
        return {**found, "version": __version__, "constrained": did["constrained_steps"] > 0}


class _CallbackRun(Run):
    """A training of which a callback knows the arguments and the model."""

    def __init__(self, args: TrainingArguments, model: nn.Module, tokenizer: Any, chat: ChatSettings | None) -> None:
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        progress = not args.disable_tqdm and PartialState().is_main_process
        super().__init__(model, tokenizer, chat=chat, folder=output_folder(args), progress=progress)
        self.precision: str = AcceleratorState().mixed_precision

    def autocast(self) -> AbstractContextManager[Any]:
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision)
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)


def _refuse(args: TrainingArguments, model: nn.Module) -> None:
    refuse_data_parallel(args.n_gpu)
    refuse_noise(args.neftune_noise_alpha)
    if (getattr(model, "tp_size", None) or 1) > 1:
        raise ProConError(
            "the model is split by tensor parallelism, whose ranks share batches: train with DDP, FSDP or DeepSpeed"
        )
    if args.label_smoothing_factor:
        raise ProConError(
            f"label_smoothing_factor makes a loss of its own, without the constraint: set it to 0, or {REMEDY}"
        )


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
