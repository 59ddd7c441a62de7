"""The constraint inside the model's own forward, for frameworks that let neither the collator nor the loss be changed.

Whatever trains on ``outputs.loss`` is then constrained, for example in LLaMA-Factory and unsloth. If the Trainer class
can be chosen, :class:`procon.training.ProConMixin` is the better way: it has all token scopes and reductions, the
warm-up that is added to the training, and it looks anchors up in the loader's workers.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from torch.autograd import Variable
from transformers import PreTrainedTokenizerBase

from procon.anchors import Anchors
from procon.constraint import ProjectionConstraint
from procon.constraint.copies import ModuleForward
from procon.errors import ProConError
from procon.models import transformers_model
from procon.settings import DEFAULTS, Fuse, TokenScope, check_alpha, check_setting
from procon.training.evidence import Evidence

#: The tokens that the model's own loss counts, so that what divides the one divides the other: the trainer hands over
#: their number alone. Hence no other scope here, whatever the default of the settings is.
SCOPE: TokenScope = "response"

REMEDY = "use ProConTrainer or ProConSFTTrainer, or put ProConMixin before the trainer's class"


class ConstrainedForward:
    """While attached, a causal LM's training forwards return ``loss + alpha * penalty``; no other forward is touched.

    Usage, around whatever trains ``model`` on ``outputs.loss``::

        with ConstrainedForward(model, ProjectionConstraint(directions), anchors, alpha=0.1):
            trainer.train()

    A training forward is one in training mode with gradients enabled. It needs ``input_ids`` and ``labels``, whose
    tokens are taken to the CPU and looked up there: one synchronisation with the device for each micro-batch.

    The penalty scales as the model's own loss does. If the trainer hands over ``num_items_in_batch``, the count of
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
        evidence: what the constraint has done so far.

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
        fuse: Fuse = DEFAULTS.fuse,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        check_setting("fuse", fuse)
        check_alpha(alpha)
        if anchors.scope != SCOPE:
            raise ProConError(
                f"anchors are of the scope {anchors.scope!r}, and a forward's loss counts {SCOPE!r} tokens only: "
                f"record anchors with scope={SCOPE!r}, or, to constrain other tokens, {REMEDY}"
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
        self.evidence = Evidence()
        #: Whether the coming training forward is of the model that the anchors are of.
        self.at_start = True
        self._model = model
        self._module = _causal_lm(model)
        self._fuse: Fuse = fuse
        self._decode = getattr(tokenizer, "decode", None)
        self._patch: Any = None
        self._unused = False
        self._acted = False

    def attach(self) -> ConstrainedForward:
        """Constrain the model; undone by :meth:`detach` or on leaving ``with``. After ``torch.compile`` it must come
        before the first forward, which is when it is traced."""
        if constrained_by(self._module) is not None:
            raise ProConError("this model's forward is constrained already: call detach() on what constrains it first")
        self.constraint.attach(self._model, fuse=self._fuse)
        self._replaced = vars(self._module).get("forward")
        self._original = self._module.forward
        self._parameters = list(inspect.signature(self._original).parameters)

        self._module.forward = self._patch = _Patch(self, self._module, self._original)
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

    def __exit__(self, exception: type[BaseException] | None, *_rest: object) -> None:
        try:
            if exception is None:
                self.check()
                if self.alpha > 0 and not self._acted:
                    raise ProConError(
                        "no training forward of the constrained model ran, so nothing was constrained: train that "
                        "model, in training mode and with gradients"
                    )
        finally:
            self.detach()

    def check(self) -> None:
        """Raise ProConError if the loss of the last training forward did not go through backward, or the first one did
        so without the penalty."""
        if self._unused:
            raise ProConError(
                "the loss that the last training forward returned never went through backward, so the constraint in "
                f"it was lost: if the trainer makes a loss of its own, {REMEDY}; in your own loop, call backward "
                "after each forward"
            )
        if self._acted:
            self.evidence.check_gradient()

    @torch.compiler.disable(recursive=False)  # what it calls is compiled: the original forward, as without this
    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.attached:
            return self._original(*args, **kwargs)
        if not (self._module.training and torch.is_grad_enabled()):
            with self._resting():
                outputs = self._original(*args, **kwargs)
            loss = getattr(outputs, "loss", None)
            if self.alpha > 0 and isinstance(loss, Tensor) and loss.requires_grad:
                loss.register_hook(_refuse_evaluation)
            return outputs
        self.check()
        # Stays as it is until the next training forward, since a checkpointed block runs again within backward.
        self.constraint.enabled = self.alpha > 0
        at_start, self.at_start = self.at_start, False
        if self.alpha == 0:
            return self._original(*args, **kwargs)
        given = {**dict(zip(self._parameters, args, strict=False)), **kwargs}
        count = self._set_target(given)
        self.constraint.note_departures(at_start)
        outputs = self._original(*args, **kwargs)
        if at_start:
            self.evidence.check_start(self.constraint)
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

    @torch.compiler.disable()
    def _set_target(self, given: Mapping[str, Any]) -> int:
        """Hold the coming forward to its anchors; returns the number of constrained tokens."""
        if given.get("fused_lm_head"):
            raise ProConError(f"TRL makes the loss from log-probabilities, not from the forward's: {REMEDY}")
        if given.get("shift_labels") is not None:
            raise ProConError(
                "the batch has shift_labels, so its sequences are split over ranks and anchors cannot be found: switch "
                "off context and sequence parallelism"
            )
        for name in ("input_ids", "labels"):
            if not isinstance(given.get(name), Tensor):
                raise ProConError(
                    f"a training forward has no {name}, so its loss is not the model's own and the constraint would "
                    f"be lost (by label smoothing, for example, or a compute_loss_func): {REMEDY}"
                )
        batch = self.anchors.annotate(_on_cpu(given), self._decode)
        device = given["input_ids"].device
        anchors, mask = batch["anchors"], batch["constraint_mask"]
        self.constraint.set_target(anchors.to(device, non_blocking=True), mask.to(device, non_blocking=True))
        return int(mask.sum())

    @torch.compiler.disable()
    def _add_penalty(self, outputs: Any, count: int, tokens: Tensor) -> Any:
        loss = getattr(outputs, "loss", None)
        if not isinstance(loss, Tensor):
            raise ProConError(
                f"the model returned a {type(outputs).__name__} without a loss in training, so the constraint would "
                f"be lost: {REMEDY}"
            )
        tokens = tokens.clamp_min(1)
        share = self.constraint.penalty(tokens)
        self.penalty_sum = self.penalty_sum + (share * tokens).detach()
        self.tokens += count
        self._unused = True
        self.evidence.watch(share, None)
        share.register_hook(self._arrived)
        outputs.loss = loss + self.alpha * share.to(loss.device)
        return outputs

    def _arrived(self, _gradient: Tensor) -> None:
        self._unused, self._acted = False, True
        self.backwards += 1
        # At the end of this backward, not now: checkpointed blocks are still to run again.
        Variable._execution_engine.queue_callback(self.constraint.release)


def _refuse_evaluation(_gradient: Tensor) -> None:
    raise ProConError(
        "a loss goes through backward without a training forward: the model was in evaluation mode, so the constraint "
        "would be lost: call model.train() before the forward, or detach() if that is no training"
    )


class _Patch(ModuleForward):
    """The forward of a constrained model."""

    def __init__(self, constrained: ConstrainedForward, module: nn.Module, original: Any) -> None:
        functools.update_wrapper(self, original)  # the Trainer reads its signature
        super().__init__(module, constrained._forward)
        self.constrained_by = constrained


def _causal_lm(model: nn.Module) -> nn.Module:
    """The module whose forward takes the labels: below what wraps it for training, and below PEFT."""
    # Unlike `unwrapped`, below torch.compile too.
    inner: Any = extract_model_from_parallel(model, keep_torch_compile=False)
    return transformers_model(inner)


def constrained_by(model: nn.Module) -> ConstrainedForward | None:
    """What constrains the forward of ``model``, if anything does."""
    found = getattr(_causal_lm(model).forward, "constrained_by", None)
    return found if found is not None and found.attached else None


def _on_cpu(given: Mapping[str, Any]) -> dict[str, Tensor]:
    """What separates the sequences of a batch, on the CPU by one transfer, and all other tensors as they are."""
    shape = given["input_ids"].shape
    batch = {"input_ids": given["input_ids"]}
    for name in ("labels", "attention_mask", "position_ids"):
        value = given.get(name)
        if value is None:
            continue
        if not isinstance(value, Tensor) or value.shape != shape:
            what = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ProConError(
                f"{name} is {what}, but input_ids are {tuple(shape)}, so the sequences cannot be separated: pass a "
                "tensor of the same shape, and no mask of attention between tokens"
            )
        batch[name] = value.to(batch["input_ids"].device)
    stacked = torch.stack([value.long() for value in batch.values()]).cpu()
    others = {name: value for name, value in given.items() if isinstance(value, Tensor) and name not in batch}
    return {**others, **dict(zip(batch, stacked, strict=True))}
