"""The method in transformers' Trainer, and in any trainer that extends it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.liger import apply_liger_kernel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, rotate_checkpoints

from procon.anchors import LiveAnchors
from procon.chat import describe_chat
from procon.constraint import constrained_tokens
from procon.constraint.proof import refuse_data_parallel, refuse_noise
from procon.directions import Directions
from procon.errors import ProConError
from procon.files import sync_files, writing
from procon.method import ProCon, Run, check_batches, makes_batches, once_through
from procon.method.record import check_resumed, write_record
from procon.models import is_sharded, keep_quantised, unwrapped
from procon.ranks import on_main
from procon.settings import ChatSettings, ProConSettings
from procon.training.config import PREFIX, ProConArguments
from procon.training.loss_scale import loss_scale
from procon.training.model_card import write_section
from procon.training.run_folder import (
    REMEDIES,
    Checkpoint,
    claim,
    latest,
    locked,
    open_checkpoint,
    output_folder,
    run_facts,
    seal,
)
from procon.version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    class _Trainer(Trainer):
        """The trainer that the mixin stands before."""

        model: PreTrainedModel  # or PEFT's, which takes from its base what it lacks
        processing_class: Any
        train_dataset: Any

else:
    _Trainer = object


class TrainerRun(Run):
    """A training by transformers' Trainer; asked as it goes, since models are wrapped and loaded on the way."""

    def __init__(self, trainer: ProConMixin, chat: ChatSettings | None) -> None:
        self._trainer = trainer
        self.chat = chat or ChatSettings()

    @property
    def model(self) -> nn.Module:
        return cast(nn.Module, self._trainer.model)

    @property
    def tokenizer(self) -> Any:
        """``processing_class``, or the tokenizer that a processor of images too has."""
        found = self._trainer.processing_class
        return getattr(found, "tokenizer", found)

    @property
    def folder(self) -> Path:
        return output_folder(self._trainer.args)

    @property
    def progress(self) -> bool:
        return self._trainer.is_world_process_zero() and not self._trainer.args.disable_tqdm

    @property
    def device(self) -> torch.device:
        return self._trainer.args.device

    @property
    def groups(self) -> int:
        return self._trainer.args.world_size // self._trainer.get_tp_size()

    @property
    def group(self) -> int:
        return self._trainer.args.process_index // self._trainer.get_tp_size()

    @property
    def is_loaded_in_parts(self) -> bool:
        return getattr(self._trainer, "is_distributed_loading_by_transformers", False)

    @property
    def reference(self) -> nn.Module | None:
        found = getattr(self._trainer, "ref_model", None) if self._trainer._has_reference else None
        return None if found is None else unwrapped(found)

    def autocast(self) -> AbstractContextManager[Any]:
        return self._trainer.compute_loss_context_manager()

    def total(self, tensor: Tensor) -> Tensor:
        """Each rank of tensor parallelism has the sum of the whole batch."""
        return cast(Tensor, self._trainer.accelerator.reduce(tensor / self._trainer.get_tp_size(), "sum"))

    def project(self, live: LiveAnchors, batch: dict[str, Any]) -> Tensor:
        return self._trainer._project_live(live, batch)


class ProConMixin(_Trainer):
    """Makes the loss of a Trainer ``CE + alpha * constraint`` (paper section III-C)::

        class MyProConTrainer(ProConMixin, MyTrainer): ...

    The penalty scales as CE does: its token sum is divided by the constrained tokens of the whole optimiser step, over
    micro-batches and ranks. If alpha is 0, hooks do nothing; a schedule that is 0 throughout records nothing, and
    the class is the one that it extends.

    Args:
        model, args, train_dataset, ...: as for the trainer that is extended; ``args`` has :class:`ProConArguments`
            among its classes. For training tokens, the collator gives ``input_ids`` and ``labels``, -100 on the prompt.
        directions: refusal directions of the model as training starts, or directions of other concepts, or the file
            that they were saved in. If not given and a term needs them, refusal directions are extracted with the
            built-in prompts when training starts, which needs a tokenizer as ``processing_class``, and kept in the
            output folder.
        chat: how the model is asked as directions and probes are found: system prompt and variables of its chat
            template. A resumed run must ask in the same way.

    Logs ``procon/penalty`` (mean over the logging window, before alpha) and ``procon/alpha``.

    What the constraint did is measured: at each step the penalty's gradient must go through backward, and at the first
    one it must reach a parameter that the optimiser trains. A training that ends without such a step ends in an error.

    Attributes:
        procon: the method.
        chat: how the model is asked.
        mixed_in: into the training data, and how many samples of it; for the model card.

    Raises:
        ProConError: if directions are missing or do not fit, or the set-up would lose the constraint.
    """

    procon: ProCon
    chat: ChatSettings
    mixed_in: Mapping[str, int] = {}
    _has_reference = False
    _run: dict[str, Any] | None = None
    _best: dict[str, Any] | None = None

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
            raise ProConError("what is kept belongs to one model: pass model, not model_init")
        run = TrainerRun(self, chat)
        self.procon, self.chat = ProCon(run, settings=settings, directions=directions), run.chat
        if self.procon.active:
            self._refuse()
            self.add_callback(_Steps(self.procon))

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
                f"do not allow: with cp_size above 1, take {PREFIX}terms 'tokens' and {PREFIX}anchors 'recorded'"
            )
        plugin: Any = self.accelerator.state.deepspeed_plugin
        if settings.has_probes and self.is_deepspeed_enabled and int(plugin.zero_stage) == 3:
            raise ProConError(
                "DeepSpeed ZeRO-3 takes one forward for each backward, and probes are a second one: take "
                f"{PREFIX}terms 'tokens', ZeRO 2 or FSDP2"
            )

    # ---------------------------------------------------------------- before the first step

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train, or go on from a checkpoint: one that is given, or the latest whole one for True.

        What the terms need is recorded first, in the state that training starts from, unless it is there already.

        Raises:
            ProConError: if another process trains in the output folder, or another training has left a model there; if
                the checkpoint is damaged, or of another run; if the schedule puts no step of this training under the
                constraint, the penalty does not reach what trains, or training ended before the constraint began.
        """
        folder, procon = output_folder(self.args), self.procon
        self._best = None
        with locked(folder):
            checkpoint = self._opened(resume_from_checkpoint)
            self._run = self._facts()
            if checkpoint:
                name, schedule = f"checkpoint {str(checkpoint.path)!r}", checkpoint.record["schedule"]
                if schedule != "0" and not procon.active:
                    raise ProConError(
                        f"{name} is of training under the constraint (schedule {schedule!r}), which this run "
                        "would not have: resume with the same procon_schedule, or start afresh"
                    )
                check_resumed(checkpoint.record.get("run", {}), self._run, name, REMEDIES)
            else:
                record = self._record()
                on_main(lambda: claim(folder, record))
            if procon.active:
                if self.args.use_liger_kernel:  # train() does so later, and would take the norms from the constraint
                    apply_liger_kernel(self.model, self.args.liger_kernel_config)
                if checkpoint:
                    procon.find(checkpoint.path, checkpoint.record)
                else:
                    procon.find()
            try:
                if procon.active:
                    procon.attach()
                output = super().train(str(checkpoint.path) if checkpoint else None, *args, **kwargs)
            finally:
                procon.detach()
        if procon.active:
            procon.penalty()
            check_batches(self.state.global_step > 0, self.train_dataset)
            procon.evidence.check_acted(self.state.global_step, procon.schedule)
        return output

    def _opened(self, given: str | Path | bool | None) -> Checkpoint | None:
        if not given:
            return None
        if given is not True:
            path = Path(given)
            return on_main(lambda: open_checkpoint(path))
        folder = output_folder(self.args)
        found = on_main(lambda: latest(folder))
        if found is None:
            raise ProConError(f"no complete checkpoint in {str(folder)!r} to resume from: start afresh")
        return found

    def _facts(self) -> dict[str, Any]:
        """Of the main process: others may hold no weights worth the name yet; of sharded ones, all need the others."""
        reference = getattr(self, "ref_model", None)
        # One that moves with the model, or lies on several ranks, has no weights to compare.
        if reference is not None and (getattr(self.args, "sync_ref_model", False) or is_sharded(reference)):
            reference = None
        return on_main(
            lambda: run_facts(
                self.args,
                self.model,
                self.train_dataset,
                precision=self.accelerator.mixed_precision,
                together=self.get_tp_size() * self.get_cp_size() * self.get_sp_size(),
                reads_data=self.procon.active,
                reference=reference,
            ),
            all_call=is_sharded(self.model),
        )

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
            procon.steps_in(dataloader, 1)  # refuses epochs of a stream
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
        original, self.data_collator = self.data_collator, self.procon.collator(self.data_collator)
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = original

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
        except RuntimeError as error:
            if self.procon.active and "mark a variable ready only once" in str(error):
                raise ProConError(
                    "probes reach a parameter that this batch does not, and DDP has taken it for unused: set "
                    "ddp_find_unused_parameters=False, or procon_terms 'tokens'"
                ) from error
            raise
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

    def _expected_gradient(self) -> float | None:
        """What the gradient of a micro-batch's share of the penalty is; None if an engine scales the loss."""
        if self.procon.evidence.is_measured or self.is_deepspeed_enabled:
            return None
        scaler = self.accelerator.scaler
        scale = 1.0 if scaler is None else scaler.get_scale()
        return self.procon.step.alpha * scale * (self.accelerator.num_processes // self.get_tp_size())

    # ---------------------------------------------------------------- what is left of it

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self.procon.active and "loss" in logs:
            logs.update(self.procon.log(self.state.global_step))
        super().log(logs, *args, **kwargs)

    def prediction_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        keep_quantised(model)
        return super().prediction_step(model, *args, **kwargs)

    @property
    def best(self) -> dict[str, Any] | None:
        """Step, metric and value of the checkpoint that the model was set back to; None if it is the last."""
        if self._best is None:
            return None
        state, metric = self.state, f"eval_{str(self.args.metric_for_best_model).removeprefix('eval_')}"
        return {"step": state.best_global_step, "metric": metric, "value": state.best_metric}

    def _load_best_model(self) -> None:
        folder = Path(cast(str, self.state.best_model_checkpoint))
        self._best = on_main(lambda: open_checkpoint(folder, resumes=False)).record
        super()._load_best_model()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model and, beside it, what it was trained under."""
        folder = Path(output_dir) if output_dir else output_folder(self.args)
        with writing(folder):
            if self.args.should_save and self._run is not None:
                write_record(folder, {**self._record(), "complete": False})
            super().save_model(output_dir, _internal_call)
            if self.args.should_save:
                sync_files(folder)
        self._describe(folder)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        super().create_model_card(*args, **kwargs)
        self._describe(output_folder(self.args))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        args, run_folder = self.args, Path(self._get_output_dir(trial=trial))
        folder = run_folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.procon.active:
            self.procon.penalty()
        if args.push_to_hub:
            # Of a checkpoint, the Trainer copies to the folder that it uploads only files that it knows.
            self._describe(output_folder(args))
        if args.should_save and folder.exists():
            shutil.rmtree(folder)
        self.accelerator.wait_for_everyone()
        limit, args.save_total_limit = args.save_total_limit, None  # older ones go once this one is known to be whole
        try:
            with writing(folder):
                super()._save_checkpoint(model, trial)
        finally:
            args.save_total_limit = limit
        self.accelerator.wait_for_everyone()  # until every rank has written its files
        if args.should_save:
            with writing(folder):
                seal(folder, {**self._record(), "resumable": not args.save_only_model})
            rotate_checkpoints(
                output_dir=str(run_folder),
                save_total_limit=limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )
        self.accelerator.wait_for_everyone()

    def _describe(self, folder: Path) -> None:
        """Write beside the model what it was trained under, and into its card if it was constrained."""
        if self._run is None or not self.args.should_save:
            return
        record = self._record()
        if self.procon.active and self.procon.ready:
            self.procon.save_files(folder)
        write_section(folder / "README.md", record, self.procon.directions)
        write_record(folder, record)

    def _record(self) -> dict[str, Any]:
        """What goes into ``procon.json``."""
        found = {"version": __version__, "constrained": False, "run": self._run}
        if self.best:  # whose measured facts are those of its checkpoint, not of the steps after it
            found["best"] = self.best
        if not self.procon.active:
            return {**found, "schedule": "0", "chat": describe_chat(self.processing_class, self.chat)}
        did = self._best["did"] if self._best else self.procon.did(self.state.global_step)
        found |= {**self.procon.facts(), **self.procon.state(), "did": did}
        return {**found, "mixed_in": dict(self.mixed_in), "constrained": did["constrained_steps"] > 0}


class ProConTrainer(ProConMixin, Trainer):
    """transformers' Trainer with the constraint in its loss, and otherwise the Trainer that it extends.

    ``args`` is a :class:`procon.training.ProConConfig`. The rest is said at :class:`procon.training.ProConMixin`.
    """


class _Steps(TrainerCallback):
    """Looks on while a trainer trains: every step that should be under the constraint has it, or the training stops."""

    def __init__(self, procon: ProCon) -> None:
        self._procon = procon

    def on_substep_end(self, *_: Any, **kwargs: Any) -> None:
        self._procon.evidence.next_micro_batch()

    def on_pre_optimizer_step(self, *_: Any, **kwargs: Any) -> None:
        self._procon.end_step(kwargs.get("optimizer"), kwargs["model"])

    def on_optimizer_step(self, *_: Any, **kwargs: Any) -> None:
        self._procon.after_optimizer()
