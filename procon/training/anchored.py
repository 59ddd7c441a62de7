"""Directions and anchors, wherever they come from, in any trainer that extends transformers' Trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from datasets import Dataset
from torch import nn
from torch.utils.data import DataLoader, Subset
from transformers import PreTrainedModel

from procon.anchors import AnchoredCollator, Anchors, LiveAnchors, Probes, TokenMask
from procon.anchors.live import ADAPTERS_OFF
from procon.anchors.probes import PROBES
from procon.anchors.starting_state import StartingState, check_resumed, require_length
from procon.chat import describe_chat
from procon.constraint import ProjectionConstraint
from procon.constraint.blocks import check_units
from procon.directions import Directions
from procon.errors import ProConError
from procon.models import is_sharded
from procon.schedule import AlphaSchedule
from procon.settings import ChatSettings
from procon.training.checkpoints import Checkpoint
from procon.training.config import ProConConfig
from procon.training.output import output_folder
from procon.training.ranks import on_main
from procon.training.resumable import ResumableMixin

NO_ANCHORS = "the batch has no anchors: leave get_train_dataloader and the collator to ProConMixin"

#: What the anchored collator adds to a batch; never handed to the model.
TARGET = ("anchors", "constraint_mask")

#: Settings that a resumed training shares with the one that it goes on from.
_SAME_WHEN_RESUMED = (
    "schedule",
    "scope",
    "penalty",
    "sides",
    "units",
    "reduction",
    "blocks",
    "directions",
    "anchors_from",
    "probing",
    "chat",
)


if TYPE_CHECKING:
    from transformers import Trainer

    class _Resumable(ResumableMixin, Trainer):
        """The trainer that the mixin stands before, with what constrained training makes sure of."""

        args: ProConConfig  # or any other class with ProConArguments
        model: PreTrainedModel  # or PEFT's, which takes from its base what it lacks
        processing_class: Any
        train_dataset: Any

else:
    _Resumable = ResumableMixin


class AnchoredMixin(_Resumable):
    """What the constraint of a training is made of, found before it begins: directions, and sources of anchors.

    Attributes:
        alpha_schedule: the strength of the constraint over training.
        constraint: None if there is none, or not yet directions to make it of.
        chat: how the model is asked as directions and probes are found.
    """

    alpha_schedule: AlphaSchedule
    constraint: ProjectionConstraint | None
    chat: ChatSettings
    _anchors: Anchors | None
    _live: LiveAnchors | None
    _probes: Probes | None
    _resumed: Checkpoint | None
    _directions: Directions  # there once there is a constraint
    _collator: AnchoredCollator  # there once there is a loader

    @property
    def _constrains(self) -> bool:
        return self.alpha_schedule.active

    @property
    def _chat_tokenizer(self) -> Any:
        """What the model is asked with: ``processing_class``, or the tokenizer that a processor of images too has."""
        return getattr(self.processing_class, "tokenizer", self.processing_class)

    def _check_sources(self) -> None:
        """Raise ProConError if this training cannot take its anchors from where they are to come."""
        settings = self.args.anchor_settings()
        if self.get_cp_size() > 1 and settings.anchors != "recorded":
            raise ProConError(
                f"procon_anchors is {settings.anchors!r}, and context parallelism splits the sequences of a forward "
                "over the ranks: take 'recorded' with cp_size above 1"
            )
        if not settings.has_probes:
            return
        if self.is_deepspeed_enabled and self._zero_stage() == 3:
            raise ProConError(
                "DeepSpeed ZeRO-3 takes one forward for each backward, and probes are a second one: take "
                "procon_anchors 'recorded' or 'live', ZeRO 2 or FSDP2"
            )
        if getattr(self._chat_tokenizer, "chat_template", None) is None:
            raise ProConError(
                f"procon_anchors is {settings.anchors!r}, and processing_class has no chat template to ask the probes "
                "with: pass the tokenizer of a chat model, or take 'recorded' or 'live'"
            )

    def _zero_stage(self) -> int:
        plugin: Any = self.accelerator.state.deepspeed_plugin
        return int(plugin.zero_stage)

    def _make_constraint(self, directions: Directions) -> ProjectionConstraint:
        settings = self.args.constraint_settings()
        self._directions = directions
        self.constraint = constraint = ProjectionConstraint(
            directions,
            blocks=settings.blocks,
            penalty=settings.penalty,
            sides=settings.sides,
            units=settings.units,
            backend=settings.backend,
        )
        if self.alpha_schedule.hold is not None:
            constraint.check_shift()
        anchors = self.args.anchor_settings()
        if anchors.holds_projections:
            check_units(directions, constraint.blocks)
        return constraint

    def _extract(self) -> Directions:
        """The directions of the model as it is; of the main process if there are several."""
        progress = self.is_world_process_zero() and not self.args.disable_tqdm
        return on_main(
            # Ranks round differently, and anchors belong to one set of directions.
            lambda: Directions.extract(self.model, self._chat_tokenizer, chat=self.chat, progress=progress),
            # Not yet sharded, the model may be whole on the main process alone. Sharded already, it needs all of them.
            all_call=getattr(self, "is_distributed_loading_by_transformers", False),
        )

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: DataLoader, resume_from_checkpoint: str | bool | None
    ) -> tuple[nn.Module, DataLoader]:
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if self.constraint is not None:
            # Now that the model is where it will train: on its device, sharded, in its precision.
            self._find_anchors(self.constraint)
        return prepared

    def _find_anchors(self, constraint: ProjectionConstraint) -> None:
        """What the sources need of the starting model, unless a checkpoint has it."""
        settings = self.args.anchor_settings()
        if settings.of_tokens == "recorded" and self._anchors is None:
            if not hasattr(self, "_collator"):
                raise ProConError(NO_ANCHORS)
            self._anchors = self._collator.anchors = self._record_anchors(constraint)
        if settings.of_tokens == "live" and self._live is None:
            with self.compute_loss_context_manager():
                # The adapters of a resumed run are trained already.
                self._live = self._live_anchors(constraint, True if self._resumed else None)
        if settings.has_probes and self._probes is None:
            with self.compute_loss_context_manager():
                self._probes = self._record_probes(constraint)

    def _record_probes(self, constraint: ProjectionConstraint) -> Probes:
        settings = self.args.anchor_settings()
        return on_main(  # ranks round differently
            lambda: Probes.record(
                self.model,
                self._chat_tokenizer,
                self._directions,
                settings.probes,
                blocks=constraint.blocks,
                count=settings.probe_count,
                batch=settings.probe_batch,
                reply_tokens=settings.probe_reply_tokens,
                chat=self.chat,
                backend=self.args.procon_backend,
                progress=self.is_world_process_zero() and not self.args.disable_tqdm,
            ),
            all_call=is_sharded(self.model),
        )

    @property
    def _has_anchors(self) -> bool:
        """Whether every source is ready."""
        settings = self.args.anchor_settings()
        of_tokens = {"recorded": self._anchors, "live": self._live, None: True}[settings.of_tokens]
        return of_tokens is not None and (self._probes is not None or not settings.has_probes)

    def get_train_dataloader(self) -> DataLoader:
        source = self.args.anchor_settings().of_tokens
        if self.constraint is None or source is None:
            return super().get_train_dataloader()
        self._collator = AnchoredCollator(
            self.data_collator,
            TokenMask(self.args.procon_scope) if source == "live" else self._anchors,
            reduction=self.args.procon_reduction,
            tokenizer=self._chat_tokenizer,
        )
        with self._collating(self._collator):
            return super().get_train_dataloader()

    def _prepare_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Anchors stay fp32: under DeepSpeed, the Trainer casts what is floating to the model's dtype."""
        target = {name: inputs[name].to(self.args.device) for name in TARGET if name in inputs}
        prepared = super()._prepare_inputs({name: value for name, value in inputs.items() if name not in target})
        return {**prepared, **target}

    def _prepare_context_parallel_inputs(
        self, model: nn.Module, inputs: dict[str, Any]
    ) -> tuple[Callable[..., Any], dict[str, Any]]:
        """Anchors and mask are split along the sequence as the inputs are."""
        context, inputs = super()._prepare_context_parallel_inputs(model, inputs)
        target = [inputs[name] for name in TARGET if name in inputs]
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

    def _reopen_anchors(self, constraint: ProjectionConstraint, checkpoint: Checkpoint) -> None:
        """The sources as they were when the run began: the model is in that state no longer, once it is loaded."""
        found, record = checkpoint.record, self._record()
        if found.get("directions") is None:
            raise ProConError(
                f"{checkpoint} is of training without the constraint: resume with procon_schedule 0, or start afresh"
            )
        found.setdefault("anchors_from", "recorded")  # of an earlier version
        if probing := found.setdefault("probing", None):
            probing.setdefault("batch", probing["count"])
            probing.setdefault("reply_tokens", 0)
        found.setdefault("sides", "both")
        found.setdefault("chat", describe_chat(None, None))
        check_resumed(found, {name: record[name] for name in _SAME_WHEN_RESUMED}, str(checkpoint))
        settings = self.args.anchor_settings()
        if settings.of_tokens == "recorded":
            self._anchors = self._starting_state().reopen(found["anchors"])
        start = found.get("starting_model")
        if settings.of_tokens == "live" and start != ADAPTERS_OFF:
            # Of the model that was given to this run, which must be the one that the interrupted run was given.
            self._live = self._live_anchors(constraint)
            if self._live.start != start:
                raise ProConError(
                    f"{checkpoint} began from another starting model than the one given: load the model, and the "
                    "adapter, that the run began with"
                )
        if settings.has_probes:
            self._probes = Probes.load(checkpoint.path / PROBES)

    def _live_anchors(self, constraint: ProjectionConstraint, adapters_off: bool | None = None) -> LiveAnchors:
        return LiveAnchors(
            self.model,
            self._directions,
            blocks=constraint.blocks,
            backend=self.args.procon_backend,
            adapters_off=adapters_off,
            reference=self._reference_model,
        )

    @property
    def _reference_model(self) -> nn.Module | None:
        """The starting model as a module of its own, if the trainer has one anyway."""
        return None

    def _recording_dataloader(self) -> DataLoader:
        """This rank's share of the training set, longest samples first, through the training collator."""
        dataset = self.train_dataset
        require_length(dataset, "train_dataset")
        collator = self.data_collator
        if isinstance(dataset, Dataset):
            dataset = self._remove_unused_columns(dataset, description="anchors")
        else:
            collator = self._get_collator_with_removed_columns(collator, description="anchors")
        order = sorted(range(len(dataset)), key=lambda i: -_tokens(dataset[i]))
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

    @contextmanager
    def _collating(self, collator: Callable[[list[Any]], Any]) -> Iterator[None]:
        original, self.data_collator = self.data_collator, collator
        try:
            yield
        finally:
            self.data_collator = original


def _tokens(row: Mapping[str, Any]) -> int:
    """Length of a row; of preference data, that of its parts together."""
    if "input_ids" in row:
        return len(row["input_ids"])
    return sum(len(part) for name, part in row.items() if name.endswith("_ids"))
