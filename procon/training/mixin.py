"""The projection constraint in any trainer that extends transformers' Trainer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_utils import TrainOutput

from procon.anchors import AnchoredCollator, Anchors
from procon.anchors.starting_state import StartingState, check_resumed, require_length
from procon.constraint import ProjectionConstraint, constrained_tokens
from procon.constraint.guards import check_finite, refuse_data_parallel
from procon.directions import DIRECTIONS, RefusalDirections
from procon.errors import ProConError
from procon.training.checkpoints import last_complete, output_folder, read_settings, write_settings
from procon.training.config import ProConArguments, ProConConfig
from procon.training.loss_scale import loss_scale
from procon.training.model_card import describe, write_section
from procon.version import __version__

logger = logging.getLogger(__name__)

#: What the anchored collator adds to a batch; never handed to the model.
_TARGET = ("anchors", "constraint_mask")

#: Settings that a resumed training shares with the one that it goes on from.
_SAME_WHEN_RESUMED = ("schedule", "scope", "penalty", "units", "reduction", "blocks", "directions")


if TYPE_CHECKING:
    from transformers import Trainer

    class _Trainer(Trainer):
        """The trainer that the mixin stands before, with what constrained training makes sure of."""

        args: ProConConfig  # or any other class with ProConArguments
        model: PreTrainedModel  # or PEFT's, which takes from its base what it lacks
        processing_class: Any
        train_dataset: Any

else:
    _Trainer = object


class ProConMixin(_Trainer):
    """Makes the loss of a Trainer ``CE + alpha * constraint`` (paper section III-C)::

        class MyProConTrainer(ProConMixin, MyTrainer): ...

    The penalty scales as CE does: its token sum is divided by the constrained tokens of the whole optimiser step, over
    micro-batches and ranks. If alpha is 0, hooks do nothing; a schedule that is 0 throughout records no anchors, and
    the class is the one that it extends.

    Args:
        model, args, train_dataset, ...: as for the trainer that is extended; ``args`` has :class:`ProConArguments`
            among its classes, and the collator must give ``input_ids`` and ``labels`` with -100 on the prompt.
        directions: refusal directions of the model as training starts, or the file that they were saved in. If not
            given, they are extracted with the built-in prompts when training starts, which needs a tokenizer as
            ``processing_class``, and kept in the output folder.

    Logs ``procon/penalty`` (mean over the logging window, before alpha) and ``procon/alpha``.

    Raises:
        ProConError: if directions are missing or do not fit, or the set-up would lose the constraint.
    """

    _directions: RefusalDirections  # there once there is a constraint

    def __init__(
        self, *trainer_args: Any, directions: RefusalDirections | str | Path | None = None, **trainer_kwargs: Any
    ) -> None:
        super().__init__(*trainer_args, **trainer_kwargs)
        args = self.args
        if not isinstance(args, ProConArguments):
            raise ProConError(
                f"args is a {type(args).__name__}: pass one that has ProConArguments, such as ProConConfig"
            )
        if self.model_init is not None:
            raise ProConError("anchors belong to one model: pass model, not model_init")
        args.constraint_settings()  # once more, as they may have been set since args was made
        self.alpha_schedule = args.schedule()
        self.constraint: ProjectionConstraint | None = None
        self._anchors: Anchors | None = None
        self._steps_per_epoch = 1
        self._resumed_steps_per_epoch: int | None = None
        self._constrained_tokens: Tensor | None = None
        self._penalty_sum = torch.zeros((), device=args.device)
        self._penalty_steps = 0
        if not self.alpha_schedule.active:
            return
        refuse_data_parallel(args.n_gpu)
        if self.is_fsdp_enabled and not self.accelerator.is_fsdp2:
            raise ProConError("FSDP 1 flattens the parameters that identify anchors: set version 2 in fsdp_config")
        if self.get_sp_size() > 1:
            raise ProConError(
                "DeepSpeed's sequence parallelism has ranks average the model's own loss, which leaves the penalty "
                "out: use context parallelism (cp_size)"
            )
        if directions is not None:
            self._make_constraint(
                directions if isinstance(directions, RefusalDirections) else RefusalDirections.load(directions)
            )
        elif getattr(self.processing_class, "chat_template", None) is None:
            raise ProConError(
                "no refusal directions given, and processing_class has no chat template to extract them with: extract "
                "them with RefusalDirections.extract(model, tokenizer)"
            )

    @property
    def alpha(self) -> float:
        """Strength of the constraint at the current optimiser step."""
        return self.alpha_schedule.alpha(self.state.global_step, self._steps_per_epoch)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train; records anchors first, in the state that training starts from, unless they are there already."""
        found = last_complete(output_folder(self.args)) if resume_from_checkpoint is True else resume_from_checkpoint
        if resume_from_checkpoint is True and found is None:
            raise ProConError(f"no complete checkpoint in {self.args.output_dir!r} to resume from: start afresh")
        checkpoint = str(found) if found else None
        if not self.alpha_schedule.active:
            return super().train(checkpoint, *args, **kwargs)
        constraint = self.constraint
        if constraint is None:
            constraint = self._make_constraint(
                RefusalDirections.load(Path(checkpoint) / DIRECTIONS) if checkpoint else self._extract()
            )
        self._resumed_steps_per_epoch = None
        self._anchors = self._reopen_anchors(constraint, Path(checkpoint)) if checkpoint else None
        with constraint.attach(self.model, fuse=self.args.procon_fuse):
            return super().train(checkpoint, *args, **kwargs)

    def _make_constraint(self, directions: RefusalDirections) -> ProjectionConstraint:
        settings = self.args.constraint_settings()
        self._directions = directions
        self.constraint = constraint = ProjectionConstraint(
            directions,
            blocks=settings.blocks,
            penalty=settings.penalty,
            units=settings.units,
            backend=settings.backend,
        )
        return constraint

    def _extract(self) -> RefusalDirections:
        """The directions of the model as it is; of the main process if there are several."""
        main = self.is_world_process_zero()
        found: list[Any] = [None]
        # Not yet sharded, the model may be whole on the main process alone. Sharded already, it needs all of them.
        if main or getattr(self, "is_distributed_loading_by_transformers", False):
            progress = main and not self.args.disable_tqdm
            try:
                found = [RefusalDirections.extract(self.model, self.processing_class, progress=progress)]
            except ProConError as error:
                found = [error]
        # Ranks round differently, and anchors belong to one set of directions.
        broadcast_object_list(found)
        if isinstance(found[0], ProConError):
            raise found[0]
        return found[0]

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: DataLoader, resume_from_checkpoint: str | bool | None
    ) -> tuple[nn.Module, DataLoader]:
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if self.constraint is not None and self._anchors is None:
            # Now that the model is where it will train: on its device, sharded, in its precision.
            self._anchors = self._collator.anchors = self._record_anchors(self.constraint)
        return prepared

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
        return epochs, per_epoch, examples, samples, batch_size, steps_in_epoch, max_steps

    def get_train_dataloader(self) -> DataLoader:
        if self.constraint is None:
            return super().get_train_dataloader()
        self._collator = AnchoredCollator(
            self.data_collator, self._anchors, reduction=self.args.procon_reduction, tokenizer=self.processing_class
        )
        with self._collating(self._collator):
            return super().get_train_dataloader()

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[dict[str, Any]], Tensor | int | None]:
        batches, num_items_in_batch = super().get_batch_samples(*args, **kwargs)
        if self.constraint is not None and self.alpha > 0:
            self._constrained_tokens = self._count_constrained(batches)
            self._penalty_steps += 1
        return batches, num_items_in_batch

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        try:
            return super().training_step(*args, **kwargs)
        finally:
            if self.constraint is not None:
                self.constraint.release()

    def _prepare_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Anchors stay fp32: under DeepSpeed, the Trainer casts what is floating to the model's dtype."""
        target = {name: inputs[name].to(self.args.device) for name in _TARGET if name in inputs}
        prepared = super()._prepare_inputs({name: value for name, value in inputs.items() if name not in target})
        return {**prepared, **target}

    def _prepare_context_parallel_inputs(
        self, model: nn.Module, inputs: dict[str, Any]
    ) -> tuple[Callable[..., Any], dict[str, Any]]:
        """Anchors and mask are split along the sequence as the inputs are."""
        context, inputs = super()._prepare_context_parallel_inputs(model, inputs)
        target = [inputs[name] for name in _TARGET if name in inputs]
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

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        anchors, mask = (inputs.pop(name, None) for name in _TARGET)
        constraint = self.constraint
        alpha = self.alpha if constraint is not None and model.training else 0.0
        if constraint is not None:
            constraint.enabled = alpha > 0
        if constraint is None or alpha == 0:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch)
        if anchors is None or mask is None:
            raise ProConError("the batch has no anchors: leave get_train_dataloader and the collator to ProConMixin")
        constraint.set_target(anchors, mask)
        # Outputs only if they are asked for: some trainers run a second forward to make them.
        found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch)
        loss, outputs = found if isinstance(found, tuple) else (found, None)
        # This micro-batch's share of the mean over the optimiser step; shares of all micro-batches add up to it.
        share = constraint.penalty(self._constrained_tokens).to(loss.device)
        self._penalty_sum += share.detach()
        loss = loss + alpha * loss_scale(self, num_items_in_batch) * share
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self.constraint is not None and "loss" in logs:
            logs["procon/alpha"] = self.alpha_schedule.alpha(max(self.state.global_step - 1, 0), self._steps_per_epoch)
            if self._penalty_steps:
                logs["procon/penalty"] = self._check_penalty() / self._penalty_steps
                self._penalty_sum.zero_()
                self._penalty_steps = 0
        super().log(logs, *args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.constraint is not None:
            self._check_penalty()
        if self.args.push_to_hub:
            # Of a checkpoint, the Trainer copies to the folder that it uploads only files that it knows.
            self._describe(output_folder(self.args))
        super()._save_checkpoint(model, trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model and, beside it, the directions, ``procon.json`` and a section of the model card."""
        super().save_model(output_dir, _internal_call)
        self._describe(Path(output_dir) if output_dir else output_folder(self.args))

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        super().create_model_card(*args, **kwargs)
        self._describe(output_folder(self.args))

    def _describe(self, folder: Path) -> None:
        """Write beside the model how it was constrained; nothing where it was not."""
        if self.constraint is None or self._anchors is None or not self.args.should_save:
            return
        settings = self._settings(self.constraint)
        write_settings(folder, settings, self._directions)
        write_section(folder / "README.md", describe(settings, self._directions, self.state.log_history))

    def _settings(self, constraint: ProjectionConstraint) -> dict[str, Any]:
        args = self.args
        return {
            "version": __version__,
            "schedule": str(self.alpha_schedule),
            "scope": args.procon_scope,
            "penalty": args.procon_penalty,
            "units": args.procon_units,
            "reduction": args.procon_reduction,
            "blocks": list(constraint.blocks),
            "directions": self._directions.hash,
            "anchors": self._anchors.fingerprint if self._anchors else None,
            "steps_per_epoch": self._steps_per_epoch,
        }

    def _starting_state(self) -> StartingState:
        return StartingState(self.args.procon_anchors_dir, output_folder(self.args))

    def _record_anchors(self, constraint: ProjectionConstraint) -> Anchors:
        args = self.args
        with self.compute_loss_context_manager():
            return self._starting_state().record(
                self.model,
                self._recording_dataloader(),
                self._directions,
                blocks=constraint.blocks,
                scope=args.procon_scope,
                backend=args.procon_backend,
                precision=self.accelerator.mixed_precision,
                progress=not args.disable_tqdm,
            )

    def _reopen_anchors(self, constraint: ProjectionConstraint, checkpoint: Path) -> Anchors:
        found, settings = read_settings(checkpoint), self._settings(constraint)
        expected = {name: settings[name] for name in _SAME_WHEN_RESUMED}
        check_resumed(found, expected, f"checkpoint {str(checkpoint)!r}")
        self._resumed_steps_per_epoch = found.get("steps_per_epoch")
        return self._starting_state().reopen(found["anchors"])

    def _check_resumed_schedule(self) -> None:
        """Another number of ranks goes on as the interrupted run would have, if its steps are as large."""
        before, now = self._resumed_steps_per_epoch, self._steps_per_epoch
        if before is None or all(phase.steps(before) == phase.steps(now) for phase in self.alpha_schedule.phases):
            return
        raise ProConError(
            f"the checkpoint was trained with {before} steps per epoch, not {now}, and the schedule counts in epochs: "
            "keep ranks times batch size times gradient accumulation steps as it was"
        )

    def _recording_dataloader(self) -> DataLoader:
        """This rank's share of the training set, longest samples first, through the training collator."""
        dataset = self.train_dataset
        require_length(dataset, "train_dataset")
        collator = self.data_collator
        if isinstance(dataset, Dataset):
            dataset = self._remove_unused_columns(dataset, description="anchors")
        else:
            collator = self._get_collator_with_removed_columns(collator, description="anchors")
        order = sorted(range(len(dataset)), key=lambda i: -len(dataset[i]["input_ids"]))
        # Ranks of tensor parallelism compute every batch together.
        together = self.get_tp_size()
        share = order[self.args.process_index // together :: self.args.world_size // together]
        # A generator of its own: without one, iterating would draw from the global random state of training.
        return DataLoader(
            Subset(dataset, share),  # pyright: ignore[reportArgumentType]  # a datasets.Dataset serves too
            batch_size=self.args.per_device_train_batch_size,
            collate_fn=collator,
            generator=torch.Generator(),
        )

    def _sum_over_ranks(self, tensor: Tensor) -> Tensor:
        # Of a mapping, accelerate would make a mapping.
        return cast(Tensor, self.accelerator.reduce(tensor, "sum"))

    def _count_constrained(self, batches: list[dict[str, Any]]) -> Tensor:
        """Constrained tokens of the optimiser step: all its micro-batches and ranks."""
        reduce = self._sum_over_ranks if self.args.world_size > 1 else None
        count = constrained_tokens(batches, reduce, device=self.args.device)
        # As the Trainer does for CE: ranks that share a batch have each counted it.
        return count / (self.get_tp_size() * self.get_cp_size())

    def _check_penalty(self) -> float:
        """The penalty summed over the logging window and the ranks; stops a run whose hidden states went bad."""
        # Each rank of tensor parallelism has the penalty of the whole batch.
        total = self._sum_over_ranks(self._penalty_sum / self.get_tp_size()).item()
        check_finite(total, self.state.global_step)
        return total

    @contextmanager
    def _collating(self, collator: Callable[[list[Any]], Any]) -> Iterator[None]:
        original, self.data_collator = self.data_collator, collator
        try:
            yield
        finally:
            self.data_collator = original
