"""A callback that constrains any framework which builds on transformers' Trainer and takes callbacks."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Sized
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import reduce
from torch import nn
from torch.utils.data import DataLoader, Subset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from procon.anchors import Anchors
from procon.anchors.starting_state import StartingState, check_resumed, require_length
from procon.constraint import ProjectionConstraint
from procon.constraint.guards import check_finite, refuse_data_parallel, refuse_noise
from procon.directions import BlockDirections, load_directions
from procon.errors import ProConError
from procon.integrations.forward import REMEDY, SCOPE, ConstrainedForward, constrained_by
from procon.schedule import AlphaSchedule
from procon.settings import (
    DEFAULTS,
    Backend,
    Blocks,
    BlockWeights,
    ChatSettings,
    Fuse,
    Penalty,
    Sides,
    Units,
    check_setting,
)
from procon.training.block_weights import as_json, find_weights
from procon.training.checkpoints import open_checkpoint, seal
from procon.training.evidence import Evidence
from procon.training.output import forget, locked, output_folder
from procon.training.ranks import on_main
from procon.training.record import RECORD, write_record
from procon.training.run_facts import check_same_run, run_arguments, run_facts
from procon.training.watch import check_acts, check_batches
from procon.version import __version__

logger = logging.getLogger(__name__)


class ProConCallback(TrainerCallback, ExportableState):
    """Constrains the training of any framework that builds on transformers' Trainer and takes callbacks::

        run_exp(args, callbacks=[ProConCallback("refusal-directions.safetensors", schedule="1@2ep,0")])

    As training begins it records anchors from the Trainer's own data and collator, then trains through a
    :class:`ConstrainedForward`; as training ends the model is as it was. A training that an error ended leaves the
    model constrained, until it trains again or :meth:`detach` is called. A resumed training keeps the anchors of
    the one it continues, which must still be where they were recorded.

    A callback cannot lengthen the training, so the extra warm-up of ``"procon_wu"`` is refused: add its epochs to
    ``num_train_epochs``, and write it out as phases, ``"1@4ep,0"``. ``"hold"`` is refused too: it takes a trainer.

    Logs ``procon/penalty`` (mean over the tokens constrained in the logging window, before alpha) and ``procon/alpha``,
    in ``state.log_history`` and to the callbacks that come after this one. Trackers named in ``report_to`` come before:
    give ``report_to="none"`` and their callbacks after this one.

    Args:
        directions: of the model as training starts, or the file that they were saved in.
        schedule: of :meth:`procon.schedule.AlphaSchedule.parse`. ``"0"`` switches the constraint off.
        blocks, penalty, sides, units, backend: of :class:`procon.constraint.ProjectionConstraint`.
        block_weights: ``"equal"``, or ``"causal"``, which needs the Trainer's tokenizer.
        fuse: of :meth:`procon.constraint.ProjectionConstraint.attach`.
        anchors_dir: where initial projections are kept; OUTPUT_DIR/_anchors if not given.
        chat: how the model is asked for causal block weights.

    Raises:
        ProConError: if the settings or the Trainer would lose the constraint.
    """

    def __init__(
        self,
        directions: BlockDirections | str | Path,
        *,
        schedule: str = DEFAULTS.schedule,
        blocks: Blocks = DEFAULTS.blocks,
        penalty: Penalty = DEFAULTS.penalty,
        sides: Sides = DEFAULTS.sides,
        units: Units = DEFAULTS.units,
        block_weights: BlockWeights = DEFAULTS.block_weights,
        backend: Backend = DEFAULTS.backend,
        fuse: Fuse = DEFAULTS.fuse,
        anchors_dir: str | Path | None = None,
        chat: ChatSettings | None = None,
    ) -> None:
        settings = {
            "schedule": schedule,
            "blocks": blocks,
            "penalty": penalty,
            "sides": sides,
            "units": units,
            "block_weights": block_weights,
        }
        for setting, value in {**settings, "backend": backend, "fuse": fuse}.items():
            check_setting(setting, value)
        self._schedule = AlphaSchedule.parse(schedule)
        if self._schedule.hold is not None:
            raise ProConError(
                f"schedule {schedule!r} sets alpha from what is measured at each step, which a callback does not: give "
                "a schedule of phases, or use ProConTrainer or ProConSFTTrainer"
            )
        if self._schedule.extra:
            written_out = ",".join(map(str, self._schedule.phases))
            raise ProConError(
                f"schedule {schedule!r} adds epochs of warm-up before those asked for, which a callback cannot: give "
                f"schedule={written_out!r} and add them to num_train_epochs"
            )
        if not isinstance(directions, BlockDirections):
            directions = load_directions(directions)
        self._directions = directions
        self._constraint = ProjectionConstraint(
            directions, blocks=blocks, penalty=penalty, sides=sides, units=units, backend=backend
        )
        self._settings = {
            **settings,
            "schedule": str(self._schedule),
            "blocks": list(self._constraint.blocks),
            "directions": directions.hash,
            "concepts": list(directions.concepts),
        }
        self._block_weights: BlockWeights = block_weights
        self._backend: Backend = backend
        self._fuse: Fuse = fuse
        self._anchors_dir, self._chat = anchors_dir, chat
        self._steps_per_epoch = 1
        self._forward: ConstrainedForward | None = None
        self._lock = ExitStack()
        self.evidence = Evidence()
        self._run: dict[str, Any] = {}

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, in ``trainer_state.json``: settings, the anchors' folder, what was done so far."""
        anchors = self._forward.anchors.path.name if self._forward else None
        did = self.evidence.did(self.evidence.constrained_steps)
        more = {"weights": as_json(self._constraint.weights), "anchors": anchors, "did": did}
        return {"args": {}, "attributes": {**self._settings, **self._run, **more}}

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
        if not self._schedule.active:
            return
        _refuse(args, model, train_dataloader)
        self._steps_per_epoch = max(1, -(-len(train_dataloader) // args.gradient_accumulation_steps))
        # Differs on resuming if the schedule counts in epochs and the steps are of another size.
        self._settings["phase_steps"] = [
            int(phase.steps(self._steps_per_epoch)) for phase in self._schedule.phases if phase.length is not None
        ]
        check_acts(self._schedule, state.max_steps, self._steps_per_epoch)
        with _random_state_kept(args.device):
            self._run = _run(args, model, train_dataloader)
        self.evidence.restore(None)
        if state.global_step > 0:
            anchors = self._reopen_anchors(args, state)
        elif left_over is not None and left_over is self._forward:
            # The Trainer starts over, for example with a smaller batch, and the model may have moved meanwhile.
            anchors = left_over.anchors
        else:
            self._constraint.weights = find_weights(
                self._block_weights, model, processing_class, self._directions, self._constraint.blocks, self._chat
            )
            anchors = self._record_anchors(args, model, train_dataloader)
        self._forward = ConstrainedForward(
            model, self._constraint, anchors, alpha=0.0, fuse=self._fuse, tokenizer=processing_class
        ).attach()
        self._forward.evidence = self.evidence
        self._forward.at_start = state.global_step == 0 and left_over is None
        logger.info(
            "alpha schedule %s over %d steps of %d epochs, %d steps each",
            self._schedule,
            state.max_steps,
            state.num_train_epochs,
            self._steps_per_epoch,
        )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._forward is not None:
            self._forward.alpha = self._schedule.alpha(state.global_step, self._steps_per_epoch)
            self._forward.backwards = 0
        self.evidence.begin_step()

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.evidence.next_micro_batch()

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
        if self._forward is None or self._forward.alpha == 0:
            return
        self._forward.check()
        if self._forward.backwards == 0:
            raise ProConError(
                "the gradient of this step came without a training forward of the model that the Trainer named, so the "
                f"constraint was lost: train it in training mode and through its own forward, or {REMEDY}"
            )
        self.evidence.end_step(self._constraint, optimizer, model)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._forward is not None and control.should_save:
            check_finite(float(self._forward.penalty_sum), state.global_step)

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
        found = {"procon/alpha": self._forward.alpha}
        sums = torch.tensor([float(self._forward.penalty_sum), self._forward.tokens], device=PartialState().device)
        # Of a mapping, accelerate would make a mapping.
        penalty, tokens = cast(torch.Tensor, reduce(sums, "sum")).tolist()
        check_finite(penalty, state.global_step)
        if tokens:
            found["procon/penalty"] = penalty / tokens
        self._forward.penalty_sum, self._forward.tokens = 0.0, 0
        logs.update(found)
        state.log_history[-1].update(found)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        folder = output_folder(args) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if self._forward is None or not folder.exists():
            return
        PartialState().wait_for_everyone()  # until every rank has written its files
        if args.should_save:
            seal(folder, {**self._record(state), "resumable": not args.save_only_model})

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.detach()
        if self._forward is None:
            return
        self._forward = None
        self.evidence.check_acted(state.global_step, self._schedule)
        if args.should_save:
            write_record(output_folder(args), self._record(state))

    def _record(self, state: TrainerState) -> dict[str, Any]:
        did = self.evidence.did(state.global_step)
        # The penalty is summed over tokens here, and logged as a mean over those of a window.
        for name in ("mean_penalty", "penalty_sum"):
            del did[name]
        return {
            "version": __version__,
            "constrained": did["constrained_steps"] > 0,
            **self._settings,
            "weights": as_json(self._constraint.weights),
            "did": did,
            **self._run,
        }

    def _starting_state(self, args: TrainingArguments) -> StartingState:
        # None is what the arguments may be made with: they then name a folder themselves.
        return StartingState(self._anchors_dir, cast(str, args.output_dir))

    def _record_anchors(self, args: TrainingArguments, model: nn.Module, loader: DataLoader) -> Anchors:
        with _random_state_kept(args.device):
            return self._starting_state(args).record(
                model,
                _recording_loader(loader, args),
                self._directions,
                blocks=self._constraint.blocks,
                scope=SCOPE,
                backend=self._backend,
                precision=AcceleratorState().mixed_precision,
                progress=not args.disable_tqdm,
            )

    def _reopen_anchors(self, args: TrainingArguments, state: TrainerState) -> Anchors:
        # Annotated as a list of callbacks, of which TrainerState makes what each of them keeps.
        kept = cast("dict[str, Any] | None", state.stateful_callbacks)
        saved = (kept or {}).get(type(self).__name__)
        if saved is None or saved["attributes"]["anchors"] is None:
            raise ProConError(
                f"the checkpoint of step {state.global_step} was trained without a constraint, so there are no anchors "
                "to go on with: start afresh from the model that is to be constrained"
            )
        kept, name = saved["attributes"], f"the checkpoint of step {state.global_step}"
        check_resumed(kept, self._settings, name)
        check_same_run(kept, self._run["run"], self._run["arguments"], name)
        folder = output_folder(args) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if (folder / RECORD).exists():
            on_main(lambda: open_checkpoint(folder).record)
        self.evidence.restore(kept["did"])
        self._constraint.weights = kept["weights"]
        return self._starting_state(args).reopen(kept["anchors"])


def _refuse(args: TrainingArguments, model: nn.Module, loader: DataLoader) -> None:
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
    require_length(loader.dataset, "training set")
    check_batches(len(loader) > 0, loader.dataset)


def _run(args: TrainingArguments, model: nn.Module, loader: DataLoader) -> dict[str, Any]:
    precision = AcceleratorState().mixed_precision
    return {
        "run": run_facts(args, model, loader.dataset, precision=precision, reads_data=True),
        "arguments": run_arguments(args, model, data_collator=loader.collate_fn),
    }


def _recording_loader(loader: DataLoader, args: TrainingArguments) -> DataLoader:
    """This rank's share of what ``loader`` draws from, whole: training may drop other samples in each epoch."""
    samples = len(cast(Sized, loader.dataset))  # _refuse saw to it
    # A generator of its own: without one, iterating would draw from the global random state of training.
    return DataLoader(
        Subset(loader.dataset, range(args.process_index, samples, args.world_size)),
        batch_size=args.per_device_train_batch_size,
        collate_fn=loader.collate_fn,
        generator=torch.Generator(),
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
