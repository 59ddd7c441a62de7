"""The constraint inside the model's own forward, for frameworks that let neither the collator nor the loss be changed.

Whatever trains on ``outputs.loss`` is then constrained: LLaMA-Factory and unsloth, say. Where the Trainer class can be
chosen, :class:`procon.training.ProConMixin` is the better way: it has all token scopes and reductions, the warm-up that
is added to the training, and it looks anchors up in the loader's workers.
"""

from __future__ import annotations

import functools
import inspect
import logging
import math
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import extract_model_from_parallel, reduce
from torch import Tensor, nn
from torch.autograd import Variable
from torch.utils.data import DataLoader, Subset
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from procon.anchors import Anchors, fingerprint
from procon.constraint import Blocks, Fuse, ProjectionConstraint, Units
from procon.directions import RefusalDirections
from procon.errors import ProConError
from procon.schedule import AlphaSchedule

logger = logging.getLogger(__name__)

#: The tokens that the model's own loss counts, so that what divides the one divides the other.
_SCOPE = "response"

_REMEDY = "use ProConTrainer or ProConSFTTrainer, or put ProConMixin before the trainer's class"


class ConstrainedForward:
    """While attached, a causal LM's training forwards return ``loss + alpha * penalty``; no other forward is touched.

    Usage, around whatever trains ``model`` on ``outputs.loss``::

        with ConstrainedForward(model, ProjectionConstraint(directions), anchors, alpha=0.1):
            trainer.train()

    A training forward is one in training mode with gradients enabled. It needs ``input_ids`` and ``labels``, whose
    tokens are taken to the CPU and looked up there: one synchronisation with the device for each micro-batch.

    The penalty scales as the model's own loss does. Where the trainer hands over ``num_items_in_batch``, the count of
    target tokens over the optimiser step, its token sum is divided by that; else it is the mean over the micro-batch.
    So only response tokens, each counting alike, are constrained here.

    A trainer that makes a loss of its own would lose the constraint without a word. So each loss must go through
    backward before the next training forward; :meth:`check` says whether the last one did.

    Args:
        model: a causal LM, bare or wrapped.
        constraint: attached to no model yet; it is attached and detached along with this.
        anchors: of the scope ``"response"`` and the constraint's blocks.
        alpha: strength of the constraint; may be set between steps. At 0 the model's own code runs, at plain speed.
        fuse: of :meth:`ProjectionConstraint.attach`.
        tokenizer: names samples in errors.

    Attributes:
        backwards: training forwards whose penalty went through backward.
        penalty_sum: sum of the penalty over the tokens constrained, before alpha; ``tokens`` counts them. Both may be
            set back to zero.

    Raises:
        ProConError: if anchors and constraint do not belong together, or a training forward would lose the constraint.
    """

    def __init__(
        self,
        model: nn.Module,
        constraint: ProjectionConstraint,
        anchors: Anchors,
        *,
        alpha: float,
        fuse: Fuse = "auto",
        tokenizer: PreTrainedTokenizerBase | None = None,
    ):
        if anchors.scope != _SCOPE:
            raise ProConError(
                f"anchors are of the scope {anchors.scope!r}, and a forward's loss counts {_SCOPE!r} tokens only: "
                f"record anchors with scope={_SCOPE!r}, or, to constrain other tokens, {_REMEDY}"
            )
        if anchors.blocks != constraint.blocks:
            raise ProConError(
                f"anchors are of the blocks {list(anchors.blocks)}, the constraint of {list(constraint.blocks)}: "
                "record anchors with blocks=constraint.blocks"
            )
        self.constraint = constraint
        self.anchors = anchors
        self.alpha = alpha
        self.backwards = 0
        self.penalty_sum: Tensor | float = 0.0
        self.tokens = 0
        self._model = model
        self._module = _causal_lm(model)
        self._fuse: Fuse = fuse
        self._decode = getattr(tokenizer, "decode", None)
        self._patch: Any = None
        self._unused = False

    def attach(self) -> ConstrainedForward:
        """Constrain the model; undone by :meth:`detach` or on leaving ``with``. After ``torch.compile`` it must come
        before the first forward, which is when it is traced."""
        if _constraining(self._module) is not None:
            raise ProConError("this model's forward is constrained already: call detach() on what constrains it first")
        self.constraint.attach(self._model, fuse=self._fuse)
        self._replaced = vars(self._module).get("forward")
        self._original = self._module.forward
        self._parameters = list(inspect.signature(self._original).parameters)

        @functools.wraps(self._original)
        def forward(*args, **kwargs):
            return self._forward(*args, **kwargs)

        forward.constrained_by = self
        self._module.forward = self._patch = forward
        return self

    def detach(self) -> None:
        """The model is as it was."""
        # A wrapper that something laid over this one stays; it then finds the original forward underneath.
        if self._patch is not None and vars(self._module).get("forward") is self._patch:
            if self._replaced is None:
                del self._module.forward
            else:
                self._module.forward = self._replaced
        self._patch = None
        self._unused = False
        self.constraint.detach()

    @property
    def attached(self) -> bool:
        """Whether the model is constrained by this."""
        return self._patch is not None

    def __enter__(self) -> ConstrainedForward:
        return self.attach()

    def __exit__(self, exception: type[BaseException] | None, *_rest) -> None:
        try:
            if exception is None:
                self.check()
        finally:
            self.detach()

    def check(self) -> None:
        """Raise ProConError if the loss of the last training forward did not go through backward."""
        if self._unused:
            raise ProConError(
                "the loss that the last training forward returned never went through backward, so the constraint in "
                f"it was lost: if the trainer makes a loss of its own, {_REMEDY}; in your own loop, call backward "
                "after each forward"
            )

    @torch.compiler.disable(recursive=False)  # what it calls is compiled: the original forward, as without this
    def _forward(self, *args, **kwargs):
        if not self.attached:
            return self._original(*args, **kwargs)
        if not (self._module.training and torch.is_grad_enabled()):
            with self._resting():
                return self._original(*args, **kwargs)
        self.check()
        # Stays as it is until the next training forward, since a checkpointed block runs again within backward.
        self.constraint.enabled = self.alpha > 0
        if self.alpha == 0:
            return self._original(*args, **kwargs)
        given = {**dict(zip(self._parameters, args, strict=False)), **kwargs}
        count = self._set_target(given)
        outputs = self._original(*args, **kwargs)
        tokens = given.get("num_items_in_batch")
        if tokens is None:  # the model's own loss is then the mean over this micro-batch
            tokens = count
        return self._add_penalty(outputs, count, torch.as_tensor(tokens, device=given["input_ids"].device))

    @contextmanager
    def _resting(self) -> Iterator[None]:
        enabled, self.constraint.enabled = self.constraint.enabled, False
        try:
            yield
        finally:
            self.constraint.enabled = enabled

    @torch.compiler.disable
    def _set_target(self, given: Mapping[str, Any]) -> int:
        """Hold the coming forward to its anchors; returns the number of constrained tokens."""
        if given.get("fused_lm_head"):
            raise ProConError(f"TRL makes the loss from log-probabilities, not from the forward's: {_REMEDY}")
        if given.get("shift_labels") is not None:
            raise ProConError(
                "the batch has shift_labels, so its sequences are split over ranks and anchors cannot be found: switch "
                "off context and sequence parallelism"
            )
        for name in ("input_ids", "labels"):
            if not isinstance(given.get(name), Tensor):
                raise ProConError(
                    f"a training forward has no {name}, so its loss is not the model's own and the constraint would "
                    f"be lost (label smoothing, say, or a compute_loss_func): {_REMEDY}"
                )
        batch = self.anchors.annotate(_on_cpu(given), self._decode)
        device = given["input_ids"].device
        anchors, mask = batch["anchors"], batch["constraint_mask"]
        self.constraint.target(anchors.to(device, non_blocking=True), mask.to(device, non_blocking=True))
        return int(mask.sum())

    @torch.compiler.disable
    def _add_penalty(self, outputs: Any, count: int, tokens: Tensor):
        loss = getattr(outputs, "loss", None)
        if not isinstance(loss, Tensor):
            raise ProConError(
                f"the model returned a {type(outputs).__name__} without a loss in training, so the constraint would "
                f"be lost: {_REMEDY}"
            )
        tokens = tokens.clamp_min(1)
        share = self.constraint.penalty(tokens)
        self.penalty_sum = self.penalty_sum + (share * tokens).detach()
        self.tokens += count
        self._unused = True
        share.register_hook(self._arrived)
        outputs.loss = loss + self.alpha * share.to(loss.device)
        return outputs

    def _arrived(self, _gradient: Tensor) -> None:
        self._unused = False
        self.backwards += 1
        # At the end of this backward, not now: checkpointed blocks are still to run again.
        Variable._execution_engine.queue_callback(self.constraint.release)


class ProConCallback(TrainerCallback, ExportableState):
    """Constrains the training of any framework that builds on transformers' Trainer and takes callbacks::

        run_exp(args, callbacks=[ProConCallback("refusal-directions.safetensors", schedule="1@2ep,0")])

    As training begins it records anchors from the Trainer's own data and collator, then trains through a
    :class:`ConstrainedForward`; as training ends the model is as it was. A training that an error ended leaves the
    model constrained, until it trains again or :meth:`detach` is called. A resumed training is held to the anchors of
    the one it continues, which must still be where they were recorded.

    A callback cannot lengthen the training, so the extra warm-up of ``"procon_wu"`` is refused: add its epochs to
    ``num_train_epochs``, and write it out as phases, ``"1@4ep,0"``.

    Logs ``procon/penalty`` (mean over the tokens constrained in the logging window, before alpha) and ``procon/alpha``,
    in ``state.log_history`` and to the callbacks that come after this one. Trackers named in ``report_to`` come before:
    give ``report_to="none"`` and their callbacks after this one.

    Args:
        directions: of the model as training starts, or the file that they were saved in.
        schedule: of :meth:`procon.schedule.AlphaSchedule.parse`. ``"0"`` switches the constraint off.
        blocks, penalty, units, backend: of :class:`procon.constraint.ProjectionConstraint`.
        fuse: of :meth:`procon.constraint.ProjectionConstraint.attach`.
        anchors_dir: where initial projections are kept; OUTPUT_DIR/_anchors if not given.

    Raises:
        ProConError: if the settings or the Trainer would lose the constraint.
    """

    def __init__(
        self,
        directions: RefusalDirections | str | Path,
        *,
        schedule: str = "procon_s",
        blocks: Blocks = "all",
        penalty: str = "squared",
        units: Units = "raw",
        backend: str = "auto",
        fuse: Fuse = "auto",
        anchors_dir: str | Path | None = None,
    ):
        self._schedule = AlphaSchedule.parse(schedule)
        if self._schedule.extra:
            written_out = ",".join(map(str, self._schedule.phases))
            raise ProConError(
                f"schedule {schedule!r} adds epochs of warm-up before those asked for, which a callback cannot: give "
                f"schedule={written_out!r} and add them to num_train_epochs"
            )
        if not isinstance(directions, RefusalDirections):
            directions = RefusalDirections.load(directions)
        self._directions = directions
        self._constraint = ProjectionConstraint(
            directions, blocks=blocks, penalty=penalty, units=units, backend=backend
        )
        self._settings = {
            "schedule": str(self._schedule),
            "blocks": list(self._constraint.blocks),
            "penalty": penalty,
            "units": units,
            "directions": directions.hash,
        }
        self._fuse: Fuse = fuse
        self._anchors_dir = anchors_dir
        self._steps_per_epoch = 1
        self._forward: ConstrainedForward | None = None

    def state(self) -> dict:
        """What a checkpoint keeps, in ``trainer_state.json``: the settings and the anchors' folder."""
        anchors = self._forward.anchors.path.name if self._forward else None
        return {"args": {}, "attributes": {**self._settings, "anchors": anchors}}

    def detach(self) -> None:
        """Leave the model as it was, after a training that an error ended."""
        if self._forward is not None:
            self._forward.detach()

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if args.restore_callback_states_from_checkpoint:
            raise ProConError(
                "restore_callback_states_from_checkpoint makes callbacks anew, without directions: leave it False; "
                "ProConCallback reads its own state"
            )

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        processing_class: Any = None,
        train_dataloader: DataLoader | None = None,
        **kwargs,
    ) -> None:
        left_over = _constraining(model)
        if left_over is not None:
            left_over.detach()
        if not self._schedule.active:
            return
        _refuse(args, model, train_dataloader)
        self._steps_per_epoch = max(1, -(-len(train_dataloader) // args.gradient_accumulation_steps))
        # Differs on resuming where the schedule counts in epochs and the steps are of another size.
        self._settings["phase_steps"] = [
            int(phase.steps(self._steps_per_epoch)) for phase in self._schedule.phases if phase.length is not None
        ]
        if state.global_step > 0:
            anchors = self._reopen_anchors(args, state)
        elif left_over is not None and left_over is self._forward:
            # The Trainer starts over, with a smaller batch say, and the model may have moved meanwhile.
            anchors = left_over.anchors
        else:
            anchors = self._record_anchors(args, model, train_dataloader)
        self._forward = ConstrainedForward(
            model, self._constraint, anchors, alpha=0.0, fuse=self._fuse, tokenizer=processing_class
        ).attach()
        logger.info(
            "alpha schedule %s over %d steps of %d epochs, %d steps each",
            self._schedule,
            state.max_steps,
            state.num_train_epochs,
            self._steps_per_epoch,
        )

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if self._forward is not None:
            self._forward.alpha = self._schedule.alpha(state.global_step, self._steps_per_epoch)
            self._forward.backwards = 0

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs
    ) -> None:
        if self._forward is None or self._forward.alpha == 0:
            return
        self._forward.check()
        if self._forward.backwards == 0:
            raise ProConError(
                "the gradient of this step came without a training forward of the model that the Trainer named, so the "
                f"constraint was lost: train it in training mode and through its own forward, or {_REMEDY}"
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if self._forward is not None and control.should_save:
            _check_finite(float(self._forward.penalty_sum), state)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict | None = None, **kwargs
    ) -> None:
        if self._forward is None or logs is None or "loss" not in logs:
            return
        found = {"procon/alpha": self._forward.alpha}
        sums = torch.tensor([float(self._forward.penalty_sum), self._forward.tokens], device=PartialState().device)
        penalty, tokens = reduce(sums, "sum").tolist()
        _check_finite(penalty, state)
        if tokens:
            found["procon/penalty"] = penalty / tokens
        self._forward.penalty_sum, self._forward.tokens = 0.0, 0
        logs.update(found)
        state.log_history[-1].update(found)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self.detach()
        self._forward = None

    def _record_anchors(self, args: TrainingArguments, model: nn.Module, loader: DataLoader) -> Anchors:
        """One folder for each starting state, so that a changed model or direction never meets old anchors."""
        blocks = self._constraint.blocks
        state = fingerprint(model, self._directions, blocks, _SCOPE)
        if (precision := AcceleratorState().mixed_precision) != "no":
            state = f"{state}-{precision}"  # the same weights give other projections
        with _random_state_kept(args.device):
            return Anchors.record(
                model,
                _recording_loader(loader, args),
                self._directions,
                self._anchors_root(args) / state,
                blocks=blocks,
                scope=_SCOPE,
                progress=not args.disable_tqdm,
                fingerprint=state,
            )

    def _reopen_anchors(self, args: TrainingArguments, state: TrainerState) -> Anchors:
        """The anchors of the interrupted training: the model is no longer in the state that they were recorded in."""
        saved = (state.stateful_callbacks or {}).get(type(self).__name__)
        if saved is None or saved["attributes"]["anchors"] is None:
            raise ProConError(
                f"the checkpoint of step {state.global_step} was trained without a constraint, so there are no anchors "
                "to go on with: start afresh from the model that is to be held"
            )
        for name, expected in self._settings.items():
            found = saved["attributes"].get(name)
            if found != expected:
                raise ProConError(
                    f"the checkpoint of step {state.global_step} was trained with {name} {found!r}, not {expected!r}: "
                    "resume with the same settings, or start afresh"
                )
        return Anchors(self._anchors_root(args) / saved["attributes"]["anchors"])

    def _anchors_root(self, args: TrainingArguments) -> Path:
        # Of the output folder, push_to_hub leaves out what begins with an underscore.
        return Path(self._anchors_dir or Path(args.output_dir) / "_anchors")


def _check_finite(penalty: float, state: TrainerState) -> None:
    if not math.isfinite(penalty):
        raise ProConError(
            f"the penalty became {penalty} by step {state.global_step}, so hidden states are NaN or infinite: resume "
            "from the last checkpoint with a lower learning rate, or train in bfloat16 or float32"
        )


def _causal_lm(model: nn.Module) -> nn.Module:
    """The module whose forward takes the labels: below what wraps it for training, and below PEFT."""
    model = extract_model_from_parallel(model, keep_torch_compile=False)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _constraining(model: nn.Module) -> ConstrainedForward | None:
    """What constrains the forward of ``model``, if anything does."""
    found = getattr(_causal_lm(model).forward, "constrained_by", None)
    return found if found is not None and found.attached else None


def _on_cpu(given: Mapping[str, Any]) -> dict[str, Tensor]:
    """What tells the sequences of a batch apart, on the CPU by one transfer, and all other tensors as they are."""
    shape = given["input_ids"].shape
    batch = {"input_ids": given["input_ids"]}
    for name in ("labels", "attention_mask", "position_ids"):
        value = given.get(name)
        if value is None:
            continue
        if not isinstance(value, Tensor) or value.shape != shape:
            what = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ProConError(
                f"{name} is {what} where input_ids are {tuple(shape)}, so the sequences cannot be told apart: pass a "
                "tensor of the same shape, and no mask of attention between tokens"
            )
        batch[name] = value.to(batch["input_ids"].device)
    stacked = torch.stack([value.long() for value in batch.values()]).cpu()
    others = {name: value for name, value in given.items() if isinstance(value, Tensor) and name not in batch}
    return {**others, **dict(zip(batch, stacked, strict=True))}


def _refuse(args: TrainingArguments, model: nn.Module, loader: DataLoader) -> None:
    if args.n_gpu > 1:
        raise ProConError("nn.DataParallel copies the model without its hooks: start one process a GPU with torchrun")
    if (getattr(model, "tp_size", None) or 1) > 1:
        raise ProConError(
            "the model is split by tensor parallelism, whose ranks share batches: train with DDP, FSDP or DeepSpeed"
        )
    if args.label_smoothing_factor:
        raise ProConError(
            "label_smoothing_factor makes a loss of its own, in which the model's, and with it the constraint, is "
            f"lost: set it to 0, or {_REMEDY}"
        )
    if not hasattr(loader.dataset, "__len__"):
        raise ProConError("anchors need a training set with a length: a streamed one cannot be recorded beforehand")


def _recording_loader(loader: DataLoader, args: TrainingArguments) -> DataLoader:
    """This rank's share of what ``loader`` draws from, whole: training may drop other samples in each epoch."""
    # A generator of its own: without one, iterating would draw from the global random state of training.
    return DataLoader(
        Subset(loader.dataset, range(args.process_index, len(loader.dataset), args.world_size)),
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
