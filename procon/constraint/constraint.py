"""The projection constraint on a model's block inputs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from procon.constraint.blocks import select_blocks
from procon.constraint.input_norm import InputNorm, find_input_norm
from procon.constraint.sharded_input import check_placements, constrain_sharded
from procon.directions import RefusalDirections
from procon.errors import ProConError
from procon.models import Decoder, active_adapters, adapter_layer, block_input, find_decoder, first_moving_block
from procon.ops import constrain, rms_norm_constrain
from procon.settings import DEFAULTS, Backend, Blocks, Fuse, Penalty, Units, check_setting

logger = logging.getLogger(__name__)

#: Of a module's call: positional and named.
_Arguments = tuple[tuple[Any, ...], dict[str, Any]]

#: A hook that may change them.
_PreForward = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], _Arguments | None]


@dataclass(frozen=True)
class _Attachment:
    """What :meth:`ProjectionConstraint.attach` found in a model, and how it is undone."""

    decoder: Decoder
    adapter_layer: BaseTunerLayer | None
    adapters: tuple[str, ...]
    fused: tuple[int, ...]
    undo: ExitStack


@dataclass(frozen=True)
class _Target:
    """What one forward is constrained to, and the penalties that it has come to so far."""

    anchors: Tensor  # [blocks, B, T, K]
    mask: Tensor  # [B, T]
    first_moving: int
    grad_was_enabled: bool
    terms: dict[int, Tensor | None]  # by column


class ProjectionConstraint:
    """Penalises departures of the block inputs from their anchors along the refusal directions.

    Mean over constrained tokens and constrained blocks of ``phi(<r_l, x_l[t]> - z0_l[t])`` (paper section III-C1,
    with a mean for the paper's sum). The op runs at each block, so one gradient of a block input is alive at a time:
    within the block's first norm if that is an RMSNorm that reads the block's input, else on the input itself.

    With ``K`` directions per block, ``phi`` is summed over them. The mean stays one over blocks, so that an alpha means
    what it means for one direction when the further ones do not move.

    Usage, in any training loop::

        with ProjectionConstraint(directions).attach(model) as constraint:
            for batch in loader:  # through an AnchoredCollator
                constraint.set_target(batch.pop("anchors"), batch.pop("constraint_mask"))
                loss = model(**batch).loss + alpha * constraint.penalty()
                loss.backward()
                constraint.release()

    Args:
        directions: one direction per block, or several.
        blocks: ``"all"`` that have a direction (paper), a list of indices, or a fraction: the deepest share of them.
        penalty: ``"squared"``, ``"absolute"`` (as the paper typesets it) or ``"huber"``.
        units: ``"raw"`` (paper), or ``"gap"``: in units of the distance between the malicious and the benign mean of
            each block, which weighs blocks alike although the residual stream grows with depth. Further directions
            are in units of the same distance as the first.
        backend: of :func:`procon.ops.constrain`.

    Attributes:
        blocks: indices of the constrained blocks, in order; the last axis of ``anchors`` follows it, with ``K`` columns
            per block.
        enabled: set to False, the model's own code runs, at plain speed (alpha 0).

    Raises:
        ProConError: for a wrong setting, or blocks that have no direction.
    """

    def __init__(
        self,
        directions: RefusalDirections,
        *,
        blocks: Blocks = DEFAULTS.blocks,
        penalty: Penalty = DEFAULTS.penalty,
        units: Units = DEFAULTS.units,
        backend: Backend = DEFAULTS.backend,
    ) -> None:
        for setting, value in {"penalty": penalty, "units": units, "backend": backend}.items():
            check_setting(setting, value)
        self.blocks = select_blocks(directions, blocks)
        self.enabled = True
        self._directions = directions
        gap = directions.gap[list(self.blocks)]
        self._scale = 1.0 / gap if units == "gap" else torch.ones_like(gap)
        self._vectors = directions.basis[list(self.blocks)] * self._scale[:, None, None]
        self._penalty: Penalty = penalty
        self._backend: Backend = backend
        self._on_device: dict[tuple[int, torch.device], Tensor] = {}
        self._attachment: _Attachment | None = None
        self._target: _Target | None = None

    @property
    def fused(self) -> tuple[int, ...]:
        """Indices of the constrained blocks whose norm does the work; empty while attached to no model."""
        return () if self._attachment is None else self._attachment.fused

    def attach(self, model: nn.Module, fuse: Fuse = DEFAULTS.fuse) -> ProjectionConstraint:
        """Hook the inputs of the constrained blocks of ``model``; undone by :meth:`detach` or on leaving ``with``.

        Args:
            model: a causal LM, bare or wrapped; before ``torch.compile`` traces it.
            fuse: ``"auto"`` lets a block's first RMSNorm do the work if it reads the block's input, which then costs
                no memory traffic; ``"never"`` leaves the norms alone.

        Raises:
            ProConError: if the directions do not fit the model, or this constraint is attached already.
        """
        check_setting("fuse", fuse)
        if self._attachment is not None:
            raise ProConError("this constraint is attached already: call detach() first")
        decoder = find_decoder(model)
        self._directions.check_fits(decoder)
        fused = []
        with ExitStack() as undo:
            undo.callback(decoder.module.register_forward_pre_hook(self._without_cache, with_kwargs=True).remove)
            for column, index in enumerate(self.blocks):
                block = decoder.blocks[index]
                norm = find_input_norm(block, decoder.hidden_size) if fuse == "auto" else None
                if norm is None:
                    hook = block.register_forward_pre_hook(self._pass_through(column), with_kwargs=True)
                    undo.callback(hook.remove)
                else:
                    norm.module.forward = MethodType(self._within_norm(column, norm), norm.module)
                    undo.callback(delattr, norm.module, "forward")
                    fused.append(index)
            layer = adapter_layer(decoder)
            self._attachment = _Attachment(decoder, layer, active_adapters(layer), tuple(fused), undo.pop_all())
        logger.info(
            "projection constraint on the inputs of %d of %d blocks, in %d of them within the block's RMSNorm",
            len(self.blocks),
            len(decoder.blocks),
            len(fused),
        )
        return self

    def detach(self) -> None:
        """The model is as it was."""
        if self._attachment is not None:
            self._attachment.undo.close()
        self._attachment = None
        self.release()

    def __enter__(self) -> ProjectionConstraint:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.detach()

    def set_target(self, anchors: Tensor, mask: Tensor) -> None:
        """Set what the next forward is constrained to.

        Args:
            anchors: ``[B, T, len(blocks) * K]``, initial projections in raw units, those of a block side by side.
            mask: ``[B, T]``, weight of each token, 0 if it is not constrained.

        Raises:
            ProConError: if the shapes do not fit, the constraint is attached to no model, or other adapters are on
                than when it was attached.
        """
        expected = (*mask.shape, len(self.blocks) * self._vectors.shape[1])
        if anchors.shape != expected:
            raise ProConError(
                f"anchors have shape {tuple(anchors.shape)}, expected {expected}: record them with the constraint's "
                "directions and blocks=constraint.blocks"
            )
        if (attachment := self._attachment) is None:
            raise ProConError("the constraint is attached to no model: call attach(model) first")
        if (adapters := active_adapters(attachment.adapter_layer)) != attachment.adapters:
            raise ProConError(
                f"the active adapters changed from {attachment.adapters} to {adapters} while the constraint was "
                "attached: record anchors with those on that train, then attach"
            )
        # Blocks first: read with a stride, each number would move a whole sector of memory.
        by_block = anchors.float().unflatten(-1, (len(self.blocks), -1)) * self._scale.to(anchors.device)[:, None]
        self._target = _Target(
            anchors=by_block.movedim(-2, 0).contiguous(),
            mask=mask.float(),
            first_moving=first_moving_block(attachment.decoder),
            grad_was_enabled=torch.is_grad_enabled(),
            terms={},
        )

    def release(self) -> None:
        """Drop the target, once backward has run; forwards without a target are then not mistaken for this one's."""
        self._target = None

    def penalty(self, tokens: Tensor | float | None = None) -> Tensor:
        """The constraint of the forward that just ran: sum over its tokens and blocks / (``tokens`` * blocks).

        Args:
            tokens: number of constrained tokens to divide by; with gradient accumulation or several ranks, the count
                over the whole optimiser step. This forward's own if not given.

        Raises:
            ProConError: if the forward did not pass every constrained block, or nothing below one of them trains.
        """
        if (target := self._target) is None:
            raise ProConError("no target is set: call set_target(anchors, mask) before the forward")
        missing = len(self.blocks) - len(target.terms)
        if missing:
            raise ProConError(
                f"the forward passed {len(target.terms)} of {len(self.blocks)} constrained blocks: attach the "
                "constraint before torch.compile, and constrain only blocks that run"
            )
        terms = [term for term in target.terms.values() if term is not None]
        if not terms:
            raise ProConError(
                "nothing below a constrained block trains, so the constraint cannot act: train parameters below one, "
                "or constrain deeper blocks"
            )
        total = torch.stack([term.to(terms[0].device) for term in terms]).sum()
        if tokens is None:
            tokens = target.mask.sum().clamp_min(1).to(total.device)
        return total / (tokens * len(self.blocks))

    def _without_cache(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Arguments | None:
        """A forward pre-hook for the decoder: beside a cache, transformers does not keep packed sequences apart."""
        constrained = self.enabled and self._target is not None and torch.is_grad_enabled()
        return (args, {**kwargs, "use_cache": False}) if constrained else None

    def _pass_through(self, column: int) -> _PreForward:
        """A forward pre-hook for a block: its input passes through the op."""

        def pre_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Arguments | None:
            hidden = block_input(args, kwargs)
            operands = self._operands(column, module, hidden)
            if operands is None:
                return None
            hidden = self._constrained(column, hidden, operands)
            if args:
                return (hidden, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": hidden}

        return pre_forward

    def _within_norm(self, column: int, norm: InputNorm) -> Callable[[nn.Module, Tensor], Tensor]:
        """A forward for a block's first norm, which gives the penalty on the way."""

        def forward(module: nn.Module, hidden_states: Tensor) -> Tensor:
            operands = self._operands(column, module, hidden_states)
            if operands is None:
                return type(module).forward(module, hidden_states)
            if isinstance(hidden_states, DTensor):
                return type(module).forward(module, self._constrained(column, hidden_states, operands))
            normed, term = rms_norm_constrain(
                hidden_states,
                module.weight,  # pyright: ignore[reportArgumentType]  # to torch's stub, a tensor or a module
                norm.eps,
                *operands,
                casting=norm.casting,
                offset=norm.offset,
                penalty=self._penalty,
                backend=self._backend,
            )
            self._keep(column, term)
            return normed

        return forward

    def _constrained(self, column: int, hidden: Tensor, operands: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """The block input passed through the op, whose penalty is kept."""
        if isinstance(hidden, DTensor):
            hidden, term = constrain_sharded(hidden, *operands, penalty=self._penalty, backend=self._backend)
        else:
            hidden, term = constrain(hidden, *operands, penalty=self._penalty, backend=self._backend)
        self._keep(column, term)
        return hidden

    def _operands(self, column: int, module: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """Directions, anchors and mask for a block's input; None if the constraint rests or cannot move it."""
        if not self.enabled:
            return None
        if (target := self._target) is None:
            if module.training and torch.is_grad_enabled():
                raise ProConError(
                    "a training forward ran without anchors while the constraint is attached: call "
                    "set_target(anchors, mask) before it, set enabled = False, or detach()"
                )
            return None
        if target.grad_was_enabled and not torch.is_grad_enabled():
            if not module.training or column in target.terms:
                return None  # a forward for metrics, such as TRL adds to the one that trains
            raise ProConError(
                "gradient checkpointing with use_reentrant=True runs the blocks without gradients, and the "
                "constraint would lose its own: set use_reentrant=False"
            )
        if column in target.terms and not _in_backward():
            raise ProConError(
                f"block {self.blocks[column]} ran twice for one target: call set_target(anchors, mask) before each "
                "forward"
            )
        if hidden.shape[:-1] != target.mask.shape:
            raise ProConError(
                f"block {self.blocks[column]} got hidden states of shape {tuple(hidden.shape)} for a mask of shape "
                f"{tuple(target.mask.shape)}: if ranks share a sequence, shard anchors and mask as its tokens are"
            )
        if isinstance(hidden, DTensor):
            check_placements(hidden, self.blocks[column])
        if not hidden.requires_grad or self.blocks[column] < target.first_moving:
            # Nothing below this block trains, so its input, and with it the penalty's gradient, cannot move.
            self._keep(column, None)
            return None
        device = hidden.device
        return self._vector(column, device), target.anchors[column].to(device), target.mask.to(device)

    def _keep(self, column: int, term: Tensor | None) -> None:
        # A checkpointed block runs again within backward: the op is repeated there, its value is not.
        if self._target is not None and column not in self._target.terms:
            self._target.terms[column] = term

    def _vector(self, column: int, device: torch.device) -> Tensor:
        key = (column, device)
        if key not in self._on_device:
            self._on_device[key] = self._vectors[column].to(device)
        return self._on_device[key]


def _in_backward() -> bool:
    """Whether autograd is running a backward now, as it is when a checkpointed block runs again."""
    return torch._C._current_graph_task_id() != -1


def constrained_tokens(
    batches: Iterable[Mapping[str, Tensor]],
    reduce: Callable[[Tensor], Tensor] | None = None,
    *,
    device: torch.device | str | None = None,
) -> Tensor:
    """What :meth:`ProjectionConstraint.penalty` divides by: the constrained tokens of an optimiser step, at least 1.

    Args:
        batches: the step's micro-batches of this rank, as an AnchoredCollator makes them.
        reduce: gives the sum of a tensor over the ranks, such as ``accelerator.reduce``; not needed on one rank.
        device: where to count, and reduce; on the device of the batches if not given.

    Raises:
        ProConError: for a batch without ``constraint_mask``.
    """
    tokens = torch.zeros((), device=device)
    for batch in batches:
        if "constraint_mask" not in batch:
            raise ProConError("the batch has no anchors: make batches with an AnchoredCollator that has been given any")
        tokens = tokens + batch["constraint_mask"].sum().to(device)
    return (tokens if reduce is None else reduce(tokens)).clamp_min(1)
