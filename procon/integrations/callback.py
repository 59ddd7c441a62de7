"""A callback that constrains any framework which builds on transformers' Trainer and takes callbacks."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from torch import nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from procon.constraint.proof import refuse_data_parallel
from procon.directions import Directions
from procon.errors import ProConError
from procon.integrations.forward import ConstrainedForward, constrained_by
from procon.method import ProCon, Run, check_batches, makes_batches, once_through
from procon.method.procon import require_length
from procon.method.record import read_record, write_record
from procon.ranks import on_main
from procon.schedule import AlphaSchedule
from procon.settings import ChatSettings, Fuse, ProConSettings, check_setting
from procon.training.run_folder import forget, output_folder
from procon.version import __version__


class ProConCallback(TrainerCallback):
    """Constrains the training of any framework that builds on transformers' Trainer and takes callbacks::

        run_exp(args, callbacks=[ProConCallback(schedule="0.2")])

    As training begins it records what the terms need, with the Trainer's own data, collator and tokenizer, then trains
    through a :class:`ConstrainedForward`; as training ends the model is as it was. A training that an error
    ended leaves the model constrained, until it trains again or :meth:`detach` is called. A resumed training keeps the
    anchors and probes of the one that it continues.

    A callback cannot lengthen the training, so the extra warm-up of ``"procon_wu"`` is refused: add its epochs to
    ``num_train_epochs``, and write it out as phases, ``"1@4ep,0"``.

    Logs ``procon/penalty`` (mean over the logging window, before alpha) and ``procon/alpha``, in ``state.log_history``
    and to the callbacks that come after this one, which those of ``report_to`` do not.

    Args:
        directions: of the model as training starts, or their file; where a term needs them, extracted if not given.
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
                f"schedule {self._settings.schedule!r} adds epochs to the training, which a callback cannot: give "
                f"schedule={written_out!r} and add them to num_train_epochs"
            )
        if directions is not None and not isinstance(directions, Directions):
            directions = Directions.load(directions)
        self._directions = directions
        self._chat = chat
        self._fuse: Fuse = fuse
        self.procon: ProCon | None = None
        self._forward: ConstrainedForward | None = None

    def detach(self) -> None:
        """Leave the model as it was, after a training that an error ended."""
        if self._forward is not None:
            self._forward.detach()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: Any, *, model: nn.Module, **kwargs: Any
    ) -> None:
        left_over = constrained_by(model)
        if left_over is not None:
            left_over.detach()
        output = output_folder(args)
        loader: DataLoader = kwargs["train_dataloader"]
        if state.global_step == 0:
            on_main(lambda: forget(output))  # what an earlier training has said of its own model
        if not self._schedule.active:
            return
        refuse_data_parallel(args.n_gpu)
        if (getattr(model, "tp_size", None) or 1) > 1:
            raise ProConError("ranks of tensor parallelism share batches: train with DDP, FSDP or DeepSpeed")
        if self._settings.has_tokens and self._settings.anchors == "recorded":
            require_length(loader.dataset, "training set")
        check_batches(makes_batches(loader), loader.dataset)
        run = _CallbackRun(args, model, kwargs.get("processing_class"), self._chat)
        # If the Trainer starts over, for example with a smaller batch, the model may have moved meanwhile.
        again = left_over is not None and left_over is self._forward and state.global_step == 0
        procon = self.procon if again else None
        if procon is None:
            procon = ProCon(run, settings=self._settings, directions=self._directions, fuse=self._fuse)
        self.procon, procon.run, procon.at_start = procon, run, not again
        if state.global_step > 0:
            folder = output / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            procon.find(folder, on_main(lambda: read_record(folder)))
        elif not again:
            procon.find()
        procon.set_steps_per_epoch(procon.steps_in(loader, args.gradient_accumulation_steps))
        procon.accumulation = args.gradient_accumulation_steps
        procon.check_acts(state.max_steps)
        procon.attach()
        self._forward = ConstrainedForward(procon, counts_all_ranks=args.average_tokens_across_devices)
        # Of the whole data: training may drop other samples in each epoch.
        size, rank, ranks = args.per_device_train_batch_size, args.process_index, args.world_size
        procon.record(lambda: once_through(loader.dataset, loader.collate_fn, size, rank=rank, ranks=ranks))
        self._forward.attach()

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if self._forward is not None:
            self._forward.procon.begin_step(state.global_step)

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._forward is not None:
            self._forward.procon.evidence.next_micro_batch()

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
            self._forward.procon.penalty()  # of all ranks; stops a run whose states went bad before it is saved

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self._forward is not None and logs is not None and "loss" in logs:
            found = self._forward.procon.log(state.global_step)
            logs.update(found)
            state.log_history[-1].update(found)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        folder = output_folder(args) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if self._forward is not None and folder.exists() and args.should_save:
            self._save(folder, self._forward.procon, state)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.detach()
        if self._forward is None:
            return
        procon, self._forward = self._forward.procon, None
        procon.penalty()
        procon.evidence.check_acted(state.global_step, procon.schedule)
        if args.should_save:
            self._save(output_folder(args), procon, state)

    def _save(self, folder: Path, procon: ProCon, state: TrainerState) -> None:
        did = procon.did(state.global_step)
        facts = {**procon.facts(), **procon.state(), "did": did, "constrained": did["constrained_steps"] > 0}
        procon.save_files(folder)
        write_record(folder, {**facts, "version": __version__})


class _CallbackRun(Run):
    """A training of which a callback knows the arguments and the model."""

    def __init__(self, args: TrainingArguments, model: nn.Module, tokenizer: Any, chat: ChatSettings | None) -> None:
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        progress = not args.disable_tqdm and PartialState().is_main_process
        super().__init__(model, tokenizer, chat=chat, folder=output_folder(args), progress=progress)

    def autocast(self) -> AbstractContextManager[Any]:
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(AcceleratorState().mixed_precision)
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)
