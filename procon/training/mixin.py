"""The method in any trainer that extends transformers' Trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.liger import apply_liger_kernel
from transformers.trainer_utils import TrainOutput

from procon.anchors import LiveAnchors
from procon.constraint import constrained_tokens
from procon.constraint.proof import refuse_data_parallel, refuse_noise
from procon.directions import Directions
from procon.errors import ProConError
from procon.method import ProCon, check_batches, makes_batches, once_through
from procon.method.ranks import on_main
from procon.method.record import write_record
from procon.settings import ChatSettings, ProConSettings
from procon.training.checkpoints import Checkpoint
from procon.training.config import PREFIX, ProConArguments, check_probe_file
from procon.training.loss_scale import loss_scale
from procon.training.model_card import describe, write_section
from procon.training.output import output_folder
from procon.training.resumable import ResumableMixin
from procon.training.run import TrainerRun

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    class _Resumable(ResumableMixin, Trainer):
        """The trainer that the mixin stands before, with what constrained training makes sure of."""

        model: PreTrainedModel  # or PEFT's, which takes from its base what it lacks
        processing_class: Any
        train_dataset: Any

else:
    _Resumable = ResumableMixin


class ProConMixin(_Resumable):
    """Makes the loss of a Trainer ``CE + alpha * constraint`` (paper section III-C)::

        class MyProConTrainer(ProConMixin, MyTrainer): ...

    The penalty scales as CE does: its token sum is divided by the constrained tokens of the whole optimiser step, over
    micro-batches and ranks. If alpha is 0, hooks do nothing; a schedule that is 0 throughout records no anchors, and
    the class is the one that it extends.

    Args:
        model, args, train_dataset, ...: as for the trainer that is extended; ``args`` has :class:`ProConArguments`
            among its classes, and the collator must give ``input_ids`` and ``labels`` with -100 on the prompt.
        directions: refusal directions of the model as training starts, or directions of other concepts, or the file
            that they were saved in. If not given, refusal directions are extracted with the built-in prompts when
            training starts, which needs a tokenizer as ``processing_class``, and kept in the output folder.
        chat: how the model is asked as directions and probes are found: system prompt and variables of its chat
            template. A resumed run must ask in the same way.

    Logs ``procon/penalty`` (mean over the logging window, before alpha) and ``procon/alpha``.

    What the constraint did is measured: at each step the penalty's gradient must go through backward, and at the first
    one it must reach a parameter that the optimiser trains. A training that ends without such a step ends in an error.

    Attributes:
        procon: the method.

    Raises:
        ProConError: if directions are missing or do not fit, or the set-up would lose the constraint.
    """

    procon: ProCon

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        order = cls.__mro__
        if Trainer in order and order.index(Trainer) < order.index(ProConMixin):
            raise ProConError(
                f"class {cls.__name__} has transformers' Trainer before ProConMixin, so none of its training would be "
                "constrained: name ProConMixin first, as in class Mine(ProConMixin, MyTrainer)"
            )

    def __init__(
        self,
        *trainer_args: Any,
        directions: Directions | str | Path | None = None,
        chat: ChatSettings | None = None,
        **trainer_kwargs: Any,
    ) -> None:
        super().__init__(*trainer_args, **trainer_kwargs)
        if not isinstance(self.args, ProConArguments):
            raise ProConError(
                f"args is a {type(self.args).__name__}: pass one that has ProConArguments, such as ProConConfig"
            )
        self.constrain(self.args.procon_settings(), directions, chat)

    def constrain(
        self,
        settings: ProConSettings,
        directions: Directions | str | Path | None = None,
        chat: ChatSettings | None = None,
    ) -> None:
        """Take up the method; once, before :meth:`train`. ProConError if this trainer would lose the constraint."""
        if self.model_init is not None:
            raise ProConError("anchors belong to one model: pass model, not model_init")
        self.procon = ProCon(TrainerRun(self, chat), settings=settings, directions=directions)
        if self.procon.active:
            self._refuse()
            self.add_callback(_Steps(self.procon))

    @property
    def chat(self) -> ChatSettings:
        """How the model is asked."""
        return self.procon.run.chat

    def _refuse(self) -> None:
        """Raise ProConError for a set-up under which the constraint could not act."""
        refuse_data_parallel(self.args.n_gpu)
        refuse_noise(self.args.neftune_noise_alpha)
        if self.is_fsdp_enabled and not self.accelerator.is_fsdp2:
            raise ProConError("FSDP 1 flattens the parameters that identify anchors: set version 2 in fsdp_config")
        if self.get_sp_size() > 1:
            raise ProConError(
                "DeepSpeed's sequence parallelism has ranks average the model's own loss, which leaves the penalty "
                "out: use context parallelism (cp_size)"
            )
        settings = self.procon.settings
        if self.get_cp_size() > 1 and (settings.anchors == "live" or settings.has_probes):
            raise ProConError(
                "context parallelism splits the sequences of a forward over the ranks, which live anchors and probes "
                f"do not allow: with cp_size above 1, take {PREFIX}anchors 'recorded' and {PREFIX}probes 'none'"
            )
        if settings.has_probes and self.is_deepspeed_enabled and self._zero_stage() == 3:
            raise ProConError(
                "DeepSpeed ZeRO-3 takes one forward for each backward, and probes are a second one: take "
                f"{PREFIX}probes 'none', ZeRO 2 or FSDP2"
            )

    def _zero_stage(self) -> int:
        plugin: Any = self.accelerator.state.deepspeed_plugin
        return int(plugin.zero_stage)

    # ---------------------------------------------------------------- before the first step

    def train(
        self, resume_from_checkpoint: str | Path | bool | Checkpoint | None = None, *args: Any, **kwargs: Any
    ) -> TrainOutput:
        """Train; records anchors first, in the state that training starts from, unless they are there already.

        Raises:
            ProConError: if the schedule puts no step of this training under the constraint, the penalty does not reach
                what trains, or the training ended before the constraint began; and what :class:`ResumableMixin` raises.
        """
        output = super().train(resume_from_checkpoint, *args, **kwargs)
        if self.procon.active:
            self.procon.penalty()
            check_batches(self.state.global_step > 0, self.train_dataset)
            self.procon.evidence.check_acted(self.state.global_step, self.procon.schedule)
        return output

    @property
    def _constrains(self) -> bool:
        return self.procon.active

    def _constraining(self, checkpoint: Checkpoint | None) -> AbstractContextManager[Any]:
        procon = self.procon
        if not procon.active:
            return super()._constraining(checkpoint)
        if self.args.use_liger_kernel:  # train() does so later, and would take the norms from the constraint
            apply_liger_kernel(self.model, self.args.liger_kernel_config)
        if checkpoint:
            procon.find(checkpoint.path, checkpoint.record)
        else:
            on_main(lambda: check_probe_file(procon.settings))
            procon.find()
        return procon.attached()

    def set_initial_training_values(
        self, args: TrainingArguments, dataloader: DataLoader
    ) -> tuple[int, int, int, int, int, int | None, int]:
        """The training's length, with the schedule's extra warm-up added before it."""
        epochs, per_epoch, examples, samples, batch_size, steps_in_epoch, max_steps = (
            super().set_initial_training_values(args, dataloader)
        )
        procon = self.procon
        procon.set_steps_per_epoch(per_epoch)
        extra = procon.schedule.extra_steps(per_epoch)
        if extra:
            samples += extra * batch_size
            max_steps += extra
            epochs = -(-max_steps // per_epoch)
        if procon.active:
            check_batches(makes_batches(dataloader), self.train_dataset)
            procon.check_acts(max_steps)
        return epochs, per_epoch, examples, samples, batch_size, steps_in_epoch, max_steps

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: DataLoader, resume_from_checkpoint: str | bool | None
    ) -> tuple[nn.Module, DataLoader]:
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if self.procon.active:
            # Now that the model is where it will train: on its device, sharded, in its precision.
            self.procon.record(self._recording_dataloader)
        return prepared

    def get_train_dataloader(self) -> DataLoader:
        if not self.procon.active:
            return super().get_train_dataloader()
        with self._collating(self.procon.collator(self.data_collator)):
            return super().get_train_dataloader()

    def _recording_dataloader(self) -> DataLoader:
        """This rank's share of the training set, longest samples first, through the training collator."""
        dataset, collator = self.train_dataset, self.data_collator
        if isinstance(dataset, Dataset):
            dataset = self._remove_unused_columns(dataset, description="anchors")
        else:
            collator = self._get_collator_with_removed_columns(collator, description="anchors")
        # Ranks of tensor parallelism compute every batch together.
        together = self.get_tp_size()
        return once_through(
            dataset,
            collator,
            self.args.per_device_train_batch_size,
            rank=self.args.process_index // together,
            ranks=self.args.world_size // together,
            name="train_dataset",
        )

    @contextmanager
    def _collating(self, collator: Callable[[list[Any]], Any]) -> Iterator[None]:
        original, self.data_collator = self.data_collator, collator
        try:
            yield
        finally:
            self.data_collator = original

    # ---------------------------------------------------------------- in a step

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[dict[str, Any]], Tensor | int | None]:
        batches, num_items_in_batch = super().get_batch_samples(*args, **kwargs)
        if self.procon.active:
            step = self.state.global_step
            tokens = self._count_constrained(batches) if self.procon.tokens and self.procon.alpha_at(step) else None
            self.procon.begin_step(step, tokens=tokens, parts=len(batches) * self.procon.run.groups)
        return batches, num_items_in_batch

    def _count_constrained(self, batches: list[dict[str, Any]]) -> Tensor | None:
        """Constrained tokens of the optimiser step: all its micro-batches and ranks."""
        reduce = self.procon.run.total if self.args.world_size > 1 else None
        # As the Trainer does for CE: ranks that share a batch have each counted it.
        return constrained_tokens(batches, reduce, device=self.args.device) / self.get_cp_size()

    def _prepare_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Anchors stay fp32: under DeepSpeed, the Trainer casts what is floating to the model's dtype."""
        target = {name: inputs[name].to(self.args.device) for name in self.procon.batch_keys if name in inputs}
        prepared = super()._prepare_inputs({name: value for name, value in inputs.items() if name not in target})
        return {**prepared, **target}

    def _prepare_context_parallel_inputs(
        self, model: nn.Module, inputs: dict[str, Any]
    ) -> tuple[Callable[..., Any], dict[str, Any]]:
        """Anchors and mask are split along the sequence as the inputs are."""
        context, inputs = super()._prepare_context_parallel_inputs(model, inputs)
        target = [inputs[name] for name in self.procon.batch_keys if name in inputs]
        if self.get_cp_size() > 1 and target:
            sharding = cast("partial[Any]", context)  # as it is under context parallelism
            given = sharding.keywords
            context = partial(
                sharding.func,
                buffers=[*given["buffers"], *target],
                buffer_seq_dims=[*given["buffer_seq_dims"], *(1 for _ in target)],
                no_restore_buffers={*given["no_restore_buffers"], *target},
            )
        return context, inputs

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        try:
            loss = super().training_step(*args, **kwargs)
            self.procon.evidence.check_backward()
            if self.accelerator.sync_gradients:
                self.procon.before_optimizer()
            return loss
        finally:
            self.procon.release()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        procon = self.procon
        if model.training:
            procon.begin(inputs)
        else:
            procon.skip(inputs)
        # Outputs only if they are asked for: some trainers run a second forward to make them.
        found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch)
        if not model.training:
            return found
        loss, outputs = found if isinstance(found, tuple) else (found, None)
        added = procon.added(loss_scale(self, num_items_in_batch), self._expected_gradient())
        if added is not None:
            loss = loss + added.to(loss.device)
        return (loss, outputs) if return_outputs else loss

    def _project_live(self, live: LiveAnchors, inputs: dict[str, Any]) -> Tensor:
        """The anchors of a batch, from a forward of the starting model."""
        return live(inputs)

    @property
    def _reference_model(self) -> nn.Module | None:
        """The starting model as a module of its own, if the trainer has one anyway."""
        return None

    def _expected_gradient(self) -> float | None:
        """What the gradient of a micro-batch's share of the penalty is; None if an engine scales the loss."""
        if self.procon.evidence.is_measured or self.is_deepspeed_enabled:
            return None
        scaler = self.accelerator.scaler
        scale = 1.0 if scaler is None else scaler.get_scale()
        return self.procon.alpha * scale * (self.accelerator.num_processes // self.get_tp_size())

    # ---------------------------------------------------------------- what is left of it

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self.procon.active and "loss" in logs:
            logs.update(self.procon.log(self.state.global_step))
        super().log(logs, *args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.procon.active:
            self.procon.penalty()
        if self.args.push_to_hub:
            # Of a checkpoint, the Trainer copies to the folder that it uploads only files that it knows.
            self._describe(output_folder(self.args))
        super()._save_checkpoint(model, trial)

    def _describe(self, folder: Path) -> None:
        """Write beside the model how it was constrained, and how much."""
        if not self.procon.active or not self.procon.ready:
            super()._describe(folder)
        elif self.args.should_save:
            record = self._record()
            self.procon.save_files(folder)
            write_section(folder / "README.md", describe(record, self.procon.directions, self.state.log_history))
            write_record(folder, record)

    def _record(self) -> dict[str, Any]:
        record = super()._record()
        if not self.procon.active:
            return record
        did = self.best_did or self.procon.did(self.state.global_step)
        found = {**record, **self.procon.facts(), **self.procon.state(), "did": did}
        return {**found, "constrained": did["constrained_steps"] > 0}


class _Steps(TrainerCallback):
    """Looks on while a trainer trains: every step that should be under the constraint has it, or the training stops."""

    def __init__(self, procon: ProCon) -> None:
        self._procon = procon

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._procon.begin_run()

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._procon.evidence.next_micro_batch()

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
        self._procon.end_step(optimizer, model)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._procon.after_optimizer()
