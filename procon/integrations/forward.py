"""The method inside the model's own forward, for frameworks that let neither the collator nor the loss be changed.

Whatever trains on ``outputs.loss`` is then constrained, for example in LLaMA-Factory and unsloth. If the trainer is at
hand, :func:`procon.protect` is the better way.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from torch.autograd import Variable
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from procon.constraint.copies import ModuleForward
from procon.errors import ProConError
from procon.method import ProCon
from procon.models import transformers_model
from procon.sequences import IGNORE_INDEX

REMEDY = "use procon.protect(trainer), ProConTrainer or ProConSFTTrainer, or put ProConMixin before the trainer's class"


class ConstrainedForward:
    """While attached, a causal LM's training forwards return ``loss + alpha * terms``; no other forward is touched.

    Usage, around whatever trains ``model`` on ``outputs.loss``::

        procon = ProCon(model, tokenizer)
        procon.prepare(loader)  # of the training set
        with ConstrainedForward(procon):
            trainer.train()

    A training forward is one in training mode with gradients enabled. It needs ``input_ids`` and ``labels``; under a
    term of training tokens, these are looked up on the CPU. Its loss must go through backward before the next one.

    The penalty scales as the model's own loss does. If the trainer hands over ``num_items_in_batch``, the count of
    target tokens over the optimiser step, each micro-batch counts by its share of them; else it is the mean over the
    micro-batch. An optimiser step is one of an optimiser that trains the model, unless a callback says when they are.

    Args:
        procon: the method, prepared.
        counts_all_ranks: whether ``num_items_in_batch`` is that of all ranks, and the trainer adds up what they have,
            as the Trainer does by default; if not, each counts its own, and they are averaged.

    Attributes:
        attached: whether the model is constrained by this.
        backwards: training forwards whose penalty went through backward.

    Raises:
        ProConError: if a training forward would lose the constraint.
    """

    def __init__(self, procon: ProCon, *, counts_all_ranks: bool = True) -> None:
        self.procon = procon
        self._averaged = 1 if counts_all_ranks else procon.run.groups
        self.attached = False
        self.backwards = 0
        self._module = _causal_lm(procon.run.model)
        self._annotate: Callable[[Any], dict[str, Any]] = procon.collator(dict)
        self._undo = ExitStack()
        self._unused = False
        self._adding = False

    def attach(self) -> ConstrainedForward:
        """Constrain the model, until :meth:`detach`; before the first forward, at which a compiled one is traced."""
        module = self._module
        if constrained_by(module) is not None:
            raise ProConError("this model's forward is constrained already: call detach() on what constrains it")
        self.procon.attach()
        self._undo.callback(self.procon.detach)
        replaced, self._original = vars(module).get("forward"), module.forward
        self._parameters = list(inspect.signature(self._original).parameters)
        patch: Any = ModuleForward(module, self._forward)
        functools.update_wrapper(patch, self._original, updated=())  # the Trainer reads its signature
        patch.constrained_by = self
        module.forward = patch

        def restore() -> None:
            # A wrapper that something laid over this one stays; it then finds the original forward underneath.
            if vars(module).get("forward") is patch:
                del module.forward
                if replaced is not None:
                    module.forward = replaced

        self._undo.callback(restore)
        self.attached = True
        return self

    def detach(self) -> None:
        """The model is as it was."""
        self.attached = self._unused = False
        self._undo.close()

    def __enter__(self) -> ConstrainedForward:
        self.attach()
        trained = {id(parameter) for parameter in self._module.parameters() if parameter.requires_grad}

        def trains(optimizer: torch.optim.Optimizer) -> bool:
            return any(id(parameter) in trained for group in optimizer.param_groups for parameter in group["params"])

        def before(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            if trains(optimizer):
                self.end_step(optimizer, self._module)

        def after(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            if trains(optimizer):
                self.procon.after_optimizer()
                self.procon.begin_step(self.procon.step.number + 1)

        self._undo.enter_context(register_optimizer_step_pre_hook(before))
        self._undo.enter_context(register_optimizer_step_post_hook(after))
        return self

    def __exit__(self, exception: type[BaseException] | None, *_rest: object) -> None:
        try:
            if exception is None:
                self.check()
                if self.procon.alpha > 0 and not self.backwards:
                    raise ProConError(
                        "no training forward of the constrained model had a penalty: train that model, and for more "
                        "steps than probe_every"
                    )
        finally:
            self.detach()

    def end_step(self, optimizer: torch.optim.Optimizer | None, model: nn.Module) -> None:
        """Before the optimiser's step: ProConError if it is without the constraint."""
        self.check()
        self.procon.before_optimizer()
        self.procon.end_step(optimizer, model)

    def check(self) -> None:
        """Raise ProConError if the loss of the last training forward did not go through backward, penalty and all."""
        if self._unused:
            raise ProConError(
                "the loss that the last training forward returned never went through backward, so the constraint in "
                f"it was lost: in a loop, call backward after each forward; if the trainer has its own loss, {REMEDY}"
            )
        if self.backwards:
            self.procon.evidence.check_gradient()

    @torch.compiler.disable(recursive=False)  # what it calls is compiled: the original forward, as without this
    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.attached or self._adding:  # or a term runs the model for its share
            return self._original(*args, **kwargs)
        if not (self._module.training and torch.is_grad_enabled()):
            with self.procon.resting():
                outputs = self._original(*args, **kwargs)
            loss = getattr(outputs, "loss", None)
            if self.procon.alpha > 0 and isinstance(loss, Tensor) and loss.requires_grad:
                loss.register_hook(_refuse_evaluation)
            return outputs
        self.check()
        # Stays as it is until the next training forward, since a checkpointed block runs again within backward.
        self.procon.pause(self.procon.alpha == 0)
        if self.procon.alpha == 0:
            return self._original(*args, **kwargs)
        given = {**dict(zip(self._parameters, args, strict=False)), **kwargs}
        share = self._begin(given)
        return self._add(self._original(*args, **kwargs), share)

    @torch.compiler.disable()
    def _begin(self, given: Mapping[str, Any]) -> Tensor | None:
        """Set the coming forward's anchors; returns this micro-batch's share of the step's target tokens, if known."""
        own_loss = all(isinstance(given.get(name), Tensor) for name in ("input_ids", "labels"))
        if not own_loss or given.get("fused_lm_head") or given.get("shift_labels") is not None:
            raise ProConError(
                "a training forward has no input_ids and labels of whole sequences, so its loss is not the model's own "
                "and the constraint would be lost (by label smoothing, a compute_loss_func, log-probabilities of TRL, "
                f"or sequence parallelism): {REMEDY}"
            )
        device, keys = given["input_ids"].device, self.procon.batch_keys
        batch = _on_cpu(given) if keys else {"labels": given["labels"]}
        found = self._annotate(batch)
        added = {name: found[name].to(device, non_blocking=True) for name in keys if name in found}
        self.procon.begin({**{name: given[name] for name in batch}, **added})
        tokens = given.get("num_items_in_batch")
        if tokens is None:
            return None
        own = (batch["labels"][..., 1:] != IGNORE_INDEX).sum().cpu()
        return own / torch.as_tensor(tokens, device="cpu").clamp_min(1)

    @torch.compiler.disable()
    def _add(self, outputs: Any, share: Tensor | None) -> Any:
        loss = getattr(outputs, "loss", None)
        if not isinstance(loss, Tensor):
            raise ProConError(f"the model returned a {type(outputs).__name__} without a loss in training: {REMEDY}")
        if share is not None:
            if share == 0:
                return outputs
            self.procon.step.parts = self._averaged / share
        # Without it the trainer takes means: over micro-batches and ranks.
        self._adding = True
        try:
            with self.procon.run.autocast():
                found = self.procon.added(self.procon.step.parts if share is None else self._averaged)
        finally:
            self._adding = False
        if found is None:
            self.procon.release()
            return outputs
        self._unused = True
        found.register_hook(self._arrived)
        outputs.loss = loss + found.to(loss.device)
        return outputs

    def _arrived(self, _gradient: Tensor) -> None:
        self._unused = False
        self.backwards += 1
        # At the end of this backward, not now: checkpointed blocks are still to run again.
        Variable._execution_engine.queue_callback(self.procon.release)


def _refuse_evaluation(_gradient: Tensor) -> None:
    raise ProConError(
        "a loss goes through backward without a training forward: the model was in evaluation mode, so the constraint "
        "would be lost: call model.train() before the forward, or detach() if that is no training"
    )


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
    ids: Tensor = given["input_ids"]
    names = ("input_ids", "labels", "attention_mask", "position_ids")
    batch = {name: given[name] for name in names if given.get(name) is not None}
    for name, value in batch.items():
        if getattr(value, "shape", None) != ids.shape:
            raise ProConError(f"{name} is no tensor of the shape of input_ids, {tuple(ids.shape)}: pass such a one")
    stacked = torch.stack([value.to(ids.device).long() for value in batch.values()]).cpu()
    others = {name: value for name, value in given.items() if isinstance(value, Tensor) and name not in batch}
    return {**others, **dict(zip(batch, stacked, strict=True))}
