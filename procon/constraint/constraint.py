"""The projection constraint on a model's block inputs."""

from __future__ import annotations

import logging
import math
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from procon.chat import warn_of_low_refusal
from procon.constraint.blocks import select_blocks
from procon.constraint.constrained_block import ConstrainedBlock, runs_again
from procon.constraint.copies import Arguments, Hook
from procon.constraint.input_norm import find_norm
from procon.constraint.proof import reaches_a_parameter, refuse_noise
from procon.constraint.target import State, Target, divisor, sums
from procon.directions import Directions
from procon.errors import ProConError
from procon.models import (
    Decoder,
    active_adapters,
    adapter_layer,
    find_decoder,
    first_moving_block,
    token_embedding,
)
from procon.ops.functional import check_constant
from procon.settings import DEFAULTS, Backend, Blocks, Fuse, Penalty, check_setting

logger = logging.getLogger(__name__)

_LOST = (
    "the model was trained while the constraint was attached, and no penalty went through backward, so nothing was "
    "constrained: call set_target(anchors, mask) before each forward and add alpha * constraint.penalty() to the loss, "
    "or detach() to train without it"
)


@dataclass(frozen=True)
class _Attachment:
    """What :meth:`ProjectionConstraint.attach` found in a model, and how it is undone."""

    decoder: Decoder
    adapter_layer: BaseTunerLayer | None
    adapters: tuple[str, ...]
    fused: tuple[int, ...]
    unfused: str
    blocks: tuple[ConstrainedBlock, ...]
    undo: ExitStack


class ProjectionConstraint:
    """Penalises departures of the block inputs from their anchors along the refusal directions.

    Mean over constrained tokens and constrained blocks of ``phi(<r_l, x_l[t]> - z0_l[t])`` (paper section III-C1,
    with a mean for the paper's sum). The op runs at each block, so one gradient of a block input is alive at a time:
    within the block's first norm if that is an RMSNorm that reads the block's input, else on the input itself.

    With ``K`` directions per block, ``phi`` is summed over them. The mean stays one over blocks, so that an alpha means
    what it means for one direction when the further ones do not move. Of several concepts
    (:class:`procon.directions.Directions`) one that has no direction at a block adds 0 there: each vector counts alike.

    Usage, in any training loop::

        with ProjectionConstraint(directions).attach(model) as constraint:
            for batch in loader:  # through an AnchoredCollator
                constraint.set_target(batch.pop("anchors"), batch.pop("constraint_mask"))
                loss = model(**batch).loss + alpha * constraint.penalty()
                loss.backward()
                constraint.release()

    Args:
        directions: one direction per block, or several, of refusal or other concepts.
        blocks: ``"all"`` that have a direction (paper), a list of indices, or a fraction: the deepest share of them.
        penalty: ``"squared"`` or ``"absolute"`` (as the paper typesets it).
        backend: of :func:`procon.ops.constrain`.

    Attributes:
        blocks: indices of the constrained blocks, in order; the last axis of ``anchors`` follows it, with ``K`` columns
            per block.
        enabled: True; set to False, the model's own code runs, at plain speed (alpha 0).

    Raises:
        ProConError: for a wrong setting, or blocks that have no direction.
    """

    def __init__(
        self,
        directions: Directions,
        *,
        blocks: Blocks = DEFAULTS.blocks,
        penalty: Penalty = DEFAULTS.penalty,
        backend: Backend = "auto",
    ) -> None:
        for setting, value in {"penalty": penalty, "backend": backend}.items():
            check_setting(setting, value)
        warn_of_low_refusal(directions.provenance.get("refusal_rate"))
        self.blocks = select_blocks(directions, blocks)
        self._directions = directions
        self._vectors = directions.basis[list(self.blocks)]  # [blocks, K, D]
        self._state = State(penalty, backend)
        #: The first moving block with which the penalty's gradient was last seen to arrive at a parameter.
        self._reached_from: int | None = None
        self._attachment: _Attachment | None = None
        self._forget()

    @property
    def enabled(self) -> bool:
        """Set to False, the model's own code runs, at plain speed (alpha 0)."""
        return self._state.enabled

    @enabled.setter
    def enabled(self, enabled: bool) -> None:
        self._state.enabled = enabled

    @property
    def fused(self) -> tuple[int, ...]:
        """Indices of the constrained blocks whose norm does the work; empty while attached to no model."""
        return () if self._attachment is None else self._attachment.fused

    @property
    def fusion(self) -> str:
        """How many of the constrained blocks' norms do the work, and why others do not, for people."""
        if (attachment := self._attachment) is None:
            return "attached to no model"
        fused, blocks = len(attachment.fused), len(self.blocks)
        said = "all" if fused == blocks else f"{fused} of {blocks}" if fused else "none"
        return f"{said} fused into the blocks' norms" + (f" ({attachment.unfused})" if fused < blocks else "")

    @property
    def acting(self) -> tuple[int, ...]:
        """Indices of the constrained blocks whose input training can move; empty while attached to no model."""
        if self._attachment is None:
            return ()
        first = first_moving_block(self._attachment.decoder)
        return tuple(block for block in self.blocks if block >= first)

    def attach(self, model: nn.Module, fuse: Fuse = "auto") -> ProjectionConstraint:
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
        refuse_noise(getattr(token_embedding(model), "neftune_noise_alpha", None))  # as transformers sets it
        fused, unfused, blocks = [], "fuse is 'never'", []
        with ExitStack() as undo:
            hook = Hook(self._before_decoder)
            undo.callback(decoder.module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            for column, index in enumerate(self.blocks):
                norm = find_norm(decoder, index) if fuse == "auto" else unfused
                block = ConstrainedBlock(self._state, column, index, self._vectors[column])
                block.attach(decoder.blocks[index], None if isinstance(norm, str) else norm, undo)
                blocks.append(block)
                if isinstance(norm, str):
                    unfused = norm
                else:
                    fused.append(index)
            layer = adapter_layer(decoder)
            found = (layer, active_adapters(layer), tuple(fused), unfused, tuple(blocks))
            self._attachment = _Attachment(decoder, *found, undo.pop_all())
        logger.info(
            "projection constraint on the inputs of %d of %d blocks, %s",
            len(self.blocks),
            len(decoder.blocks),
            self.fusion,
        )
        return self

    def detach(self) -> None:
        """The model is as it was; warns if it was trained, and the penalty left out of the loss."""
        self.release()
        if self._attachment is not None:
            self._attachment.undo.close()
            if self._trained and not self._arrived:
                logger.warning(_LOST)
        self._forget()
        self._attachment = None
        self._reached_from = self._state.first_moving = None

    def _forget(self) -> None:
        """Begin to watch whether the model trains, the penalty is asked for, and its gradient arrives."""
        self._trained = self._forwards = self._asked = self._arrived = False

    def __enter__(self) -> ProjectionConstraint:
        return self

    def __exit__(self, exception: type[BaseException] | None, *_rest: object) -> None:
        self.release()
        lost = self._forwards and not self._asked
        self.detach()
        if exception is None and lost:
            raise ProConError(_LOST)

    def set_target(self, anchors: Tensor, mask: Tensor) -> None:
        """Set what the next forward is constrained to.

        Args:
            anchors: ``[B, T, len(blocks) * K]``, initial projections, those of a block side by side.
            mask: ``[B, T]``, weight of each token, 0 if it is not constrained.

        Raises:
            ProConError: if the shapes do not fit, the constraint is attached to no model, or other adapters are on
                than when it was attached.
        """
        check_constant("anchors", anchors)
        check_constant("mask", mask)
        expected = (*mask.shape, len(self.blocks) * self._directions.k)
        if anchors.shape != expected:
            raise ProConError(
                f"anchors have shape {tuple(anchors.shape)}, expected {expected}: record them with the constraint's "
                "directions and blocks=constraint.blocks"
            )
        attachment = self._attached()
        # Blocks first: read with a stride, each number would move a whole sector of memory.
        given = anchors.unflatten(-1, (len(self.blocks), -1)).movedim(-2, 0)
        by_block = torch.empty(given.shape, dtype=torch.float32, device=given.device)
        by_block.copy_(given)
        self._set(Target(by_block, mask.float(), first_moving_block(attachment.decoder)))

    def rest(self) -> None:
        """Leave the next training forward unconstrained, for one whose loss has no penalty.

        Unlike ``enabled = False``, it needs no change before blocks run again within backward, as checkpointed ones do,
        so another forward of the same step may be constrained.
        """
        nothing = torch.empty(0)
        self._set(Target(nothing, nothing, first_moving_block(self._attached().decoder), idle=True))

    def _set(self, target: Target) -> None:
        self.release()
        self._state.first_moving = target.first_moving
        self._state.target = target
        self._stay()

    def _stay(self) -> None:
        """The op is in the norms, whatever the hub's kernels have put there since."""
        for block in self._attachment.blocks if self._attachment else ():
            block.stay()

    def _attached(self) -> _Attachment:
        """What it is attached to, with the adapters on that were on then."""
        if (attachment := self._attachment) is None:
            raise ProConError("the constraint is attached to no model: call attach(model) first")
        if (adapters := active_adapters(attachment.adapter_layer)) != attachment.adapters:
            raise ProConError(
                f"the active adapters changed from {attachment.adapters} to {adapters} while the constraint was "
                "attached: record anchors with those on that train, then attach"
            )
        return attachment

    def release(self) -> None:
        """Drop the target, so that a later forward without one is not taken for this one's; backward needs none."""
        target, self._state.target = self._state.target, None
        if target is not None and target.trained and len(target.terms) == len(self.blocks):
            self._trained = self._forwards = True

    def penalty(self, tokens: Tensor | float | None = None) -> Tensor:
        """The constraint of the forward that just ran: sum over its tokens and blocks / (``tokens`` * blocks).

        Without gradients, as under ``torch.no_grad()`` for validation, it is the value alone.

        Args:
            tokens: number of constrained tokens to divide by; with gradient accumulation or several ranks, the count
                over the whole optimiser step. This forward's own, the sum of its mask, if not given.

        Raises:
            ProConError: if the forward did not pass every constrained block, passed them without gradients, or nothing
                below one of them trains.
        """
        self._asked = True
        if (target := self._state.target) is None or target.idle:
            raise ProConError("no target is set: call set_target(anchors, mask) before the forward")
        terms = self._terms(target)
        device = next(iter(terms.values())).device
        by_block = sums([*terms.values()], device)
        penalty = by_block.sum() / (divisor(tokens, target.mask, device) * len(self.blocks))
        if penalty.requires_grad:
            penalty.register_hook(self._arrive)
        return penalty

    def _arrive(self, _gradient: Tensor) -> None:
        self._arrived = True

    def note_departures(self, noting: bool) -> None:
        """Measure in the coming forwards how far tokens are from their anchors, which waits for the device; or not."""
        self._state.departures = [] if noting else None

    def largest_departure(self) -> float:
        """Of the block that is farthest in the forwards noted: how many times as far its median token is from its
        anchor as rounding takes it; NaN if none was noted. Ends the noting."""
        found = [float(departure) for departure in self._state.departures or ()]
        self._state.departures = None
        return max((departure for departure in found if departure == departure), default=math.nan)

    def _terms(self, target: Target) -> dict[int, Tensor]:
        """By column, the penalties of the blocks whose inputs training can move; of all without gradients."""
        blocks = len(self.blocks)
        if len(target.terms) < blocks:
            if len(target.values) == blocks and not torch.is_grad_enabled():
                return target.values
            if target.values and target.trained:
                raise ProConError(
                    "gradient checkpointing with use_reentrant=True runs the blocks without gradients, and the "
                    "constraint would lose its own: set use_reentrant=False"
                )
            if target.values:
                raise ProConError(
                    "the forward ran without gradients, so its penalty has none: for the value alone, call penalty() "
                    "under torch.no_grad() too"
                )
            raise ProConError(
                f"the forward passed {len(target.terms)} of {blocks} constrained blocks: attach the constraint before "
                "torch.compile, and constrain only blocks that run"
            )
        terms = {column: term for column, term in target.terms.items() if term is not None}
        if not terms or not self._reaches_a_parameter(target, [*terms.values()]):
            raise ProConError(
                "nothing below a constrained block trains, so the constraint cannot act: train parameters below one, "
                "or constrain deeper blocks"
            )
        return terms

    def _reaches_a_parameter(self, target: Target, terms: list[Tensor]) -> bool:
        """Asked in the first step, and again when what trains begins at another block."""
        if self._reached_from == target.first_moving or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return True
        reached = reaches_a_parameter(terms)
        self._reached_from = target.first_moving if reached else None
        return reached

    def _before_decoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        """A forward pre-hook: beside a cache, transformers does not keep packed sequences apart."""
        target = self._state.target
        if not torch.compiler.is_compiling():
            self._stay()
        if module.training and torch.is_grad_enabled():
            self._trained = True
        if not self.enabled or (target is None and not runs_again()):
            return None
        if torch.is_grad_enabled():
            if target is not None:
                target.trained = True
        elif kwargs.get("past_key_values", kwargs.get("cache_params")) is not None:
            return None  # it generates
        return args, {**kwargs, "use_cache": False}
