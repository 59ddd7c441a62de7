"""Where a block's input meets the op: within the norm that reads it, or on the way there."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode
from torch.utils.checkpoint import _CachedTorchDispatchMode, _CachingTorchDispatchMode

from procon.constraint.copies import Arguments, Hook, ModuleForward
from procon.constraint.input_norm import InputNorm, is_the_hubs
from procon.constraint.proof import is_the_same
from procon.constraint.sharded_input import constrain_sharded
from procon.constraint.target import State, Target, on_device, typical_departure
from procon.errors import ProConError
from procon.models import block_input
from procon.ops import outside_backward
from procon.ops.autograd import Constrain, RmsNormConstrain
from procon.ops.backends import choose_backend
from procon.ops.functional import reach, rounding

logger = logging.getLogger(__name__)

#: What selective checkpointing sees operations with: the first time, and when a block runs again.
_SELECTIVE = (_CachingTorchDispatchMode, _CachedTorchDispatchMode)

#: What the package ``kernels`` sets on a module: the kernel, and what it is from.
_HUBS = ("forward", "_kernel_repo")

#: Directions ``[K, D]``, anchors ``[N, K]`` and mask ``[N]``, and the backend.
_Operands = tuple[Tensor, Tensor, Tensor, str]


class ConstrainedBlock:
    """One constrained block of a model.

    A checkpointed block runs again within backward, when its target may be released, or be the next forward's already.
    The gradient does not depend on it: the op keeps what its backward needs of the target from the forward that made
    the penalty. So a block that runs again only has to save the tensors that it saved then.
    """

    def __init__(self, state: State, column: int, index: int, vectors: Tensor) -> None:
        """``column`` of each target belongs to block ``index``, whose directions are ``vectors [K, D]``, float32."""
        self._state = state
        self._column = column
        self._index = index
        self._vectors = {vectors.device: vectors.contiguous()}
        self._reaches: dict[tuple[torch.device, torch.dtype, float], Tensor | None] = {}
        self._norm_did_it = True
        self._norm: nn.Module | None = None
        self._ours: ModuleForward | None = None
        #: What the norm had, or was given since, in place of its class's forward: a kernel of the hub, and its mark.
        self._theirs: dict[str, Any] = {}

    def attach(self, block: nn.Module, norm: InputNorm | None, undo: ExitStack) -> None:
        """Put the op into ``norm``, or on the way if there is none; closing ``undo`` takes it out again.

        Args:
            block: the block whose input is constrained.
            norm: the RMSNorm that reads it and can do the work.
        """
        meet = _unseen(partial(self._through, block)) if norm is None else self._note

        def on_input(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
            if (hidden := meet(block_input(args, kwargs))) is None:
                return None
            return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

        undo.callback(block.register_forward_pre_hook(Hook(on_input), with_kwargs=True).remove)
        if norm is not None:
            self._norm = norm.module
            self._ours = ModuleForward(norm.module, _unseen(self._within(norm)))
            self.stay()
            undo.callback(self._leave)

    def stay(self) -> None:
        """Put the op back into the norm, if a kernel of the hub or the class's own forward has taken its place."""
        norm, ours = self._norm, self._ours
        if norm is None or ours is None or vars(norm).get("forward") is ours or not is_the_hubs(norm):
            return
        self._theirs = {name: vars(norm).pop(name) for name in _HUBS if name in vars(norm)}
        norm.forward = ours

    def _leave(self) -> None:
        """The norm has what it would have without the op."""
        norm, self._norm = self._norm, None
        if norm is not None and vars(norm).get("forward") is self._ours:
            del norm.forward
            vars(norm).update(self._theirs)

    def _through(self, block: nn.Module, hidden: Tensor) -> Tensor | None:
        """``hidden``, passed through the op; None if there is nothing to do."""
        if not self._state.enabled or self._runs_again(block) or (target := self._target(block)) is None:
            return None
        operands = self._operands(target, hidden)
        return None if operands is None else self._constrained(target, hidden, operands)

    def _note(self, hidden: Tensor) -> None:
        """Keep what the block was called with, for its norm."""
        if self._state.enabled and (target := self._state.target) is not None:
            target.called_with[self._column] = hidden

    def _within(self, norm: InputNorm) -> Callable[[Tensor], Tensor]:
        """A forward for a block's first norm, which gives the penalty on the way."""
        module: Any = norm.module
        state = self._state

        def plain(hidden: Tensor) -> Tensor:
            theirs = self._theirs.get("forward")
            return type(module).forward(module, hidden) if theirs is None else theirs(hidden)

        def unconstrained(hidden: Tensor) -> Tensor:
            """Saves for backward what the norm saves under the constraint."""
            if not self._did_it(module, hidden):
                return plain(hidden)
            of_norm = (hidden, module.weight, norm.eps, norm.casting, norm.offset)
            rule = (state.penalty, None, True, choose_backend(state.backend, hidden.device.type))
            return RmsNormConstrain.apply(*of_norm, None, None, None, *rule)[0]

        def forward(hidden: Tensor) -> Tensor:
            if not state.enabled:
                return plain(hidden)
            if self._runs_again(module):
                return unconstrained(hidden)
            if (target := self._target(module)) is None:
                return plain(hidden)
            if (given := target.called_with.pop(self._column, None)) is None:
                return plain(hidden)  # called once more, or by another block that shares it
            of_block = self._input_of_block(given, hidden)
            did_it = of_block is hidden and not isinstance(hidden, DTensor)
            if torch.is_grad_enabled():
                self._norm_did_it = did_it
            if target.idle:
                return unconstrained(hidden)
            if (operands := self._operands(target, of_block)) is None:
                return plain(hidden)
            if not did_it:
                passed = self._constrained(target, of_block, operands)
                return plain(passed if of_block is hidden else hidden)
            of_norm = (hidden, module.weight, norm.eps, norm.casting, norm.offset)
            vectors, anchors, mask, backend = operands
            rule = (state.penalty, self._reach(hidden, vectors), True, backend)
            normed, tokens = RmsNormConstrain.apply(*of_norm, vectors, anchors, mask, *rule)
            target.keep(self._column, tokens)
            return normed

        return forward

    def _runs_again(self, module: nn.Module) -> bool:
        """Whether this is no forward of its own."""
        again = runs_again()
        if again and self._state.first_moving is None:
            self._target(module)  # without any target so far, it trains without the constraint
        return again

    def _did_it(self, module: nn.Module, hidden: Tensor) -> bool:
        """Whether the norm did the work in the forward that now runs again, or would have done it in an idle one."""
        first_moving = self._state.first_moving
        if first_moving is None or not (module.training or self._state.target is not None):
            return False  # it had no target
        return hidden.requires_grad and self._index >= first_moving and self._norm_did_it

    def _input_of_block(self, given: Tensor, hidden: Tensor) -> Tensor:
        """What the block was called with: ``given``, or ``hidden``, which its norm gets, if that is the same."""
        if isinstance(hidden, DTensor) and not isinstance(given, DTensor):
            return hidden  # a parallel plan made it of the block's input
        if is_the_same(hidden, given):
            return hidden
        if self._norm_did_it:
            logger.warning(
                "the norm of block %d reads something else than the block's input: it is constrained apart", self._index
            )
        return given

    def _target(self, module: nn.Module) -> Target | None:
        """The target of this forward; None if it has none and needs none."""
        target = self._state.target
        if target is None and module.training and torch.is_grad_enabled():
            raise ProConError(
                "a training forward ran without anchors while the constraint is attached: call "
                "set_target(anchors, mask) before it, set enabled = False, or detach()"
            )
        return target

    def _operands(self, target: Target, hidden: Tensor) -> _Operands | None:
        """What the op takes with the block's input; None if that cannot move, or the target is not its own."""
        if target.idle:
            return None
        fits = hidden.shape[:-1] == target.mask.shape
        done = self._column in target.terms
        trains = torch.is_grad_enabled()
        if not trains and (done or not fits):
            return None  # a forward for metrics, or one that generates
        if done:
            raise ProConError(
                f"block {self._index} ran twice for one target: call set_target(anchors, mask) before each forward"
            )
        if not fits:
            raise ProConError(
                f"block {self._index} got hidden states of shape {tuple(hidden.shape)} for a mask of shape "
                f"{tuple(target.mask.shape)}: if ranks share a sequence, shard anchors and mask as its tokens are"
            )
        if trains and not (hidden.requires_grad and self._index >= target.first_moving):
            # Nothing below this block trains, so its input, and with it the penalty's gradient, cannot move.
            target.terms[self._column] = None
            return None
        by_column, mask, backend = target.on(hidden.device, self._state.backend)
        anchors, vectors = by_column[self._column], on_device(self._vectors, hidden.device)
        if torch.compiler.is_compiling():
            # A graph cannot ask whether it runs again, and would save what the op makes of the target of that time.
            anchors = outside_backward(anchors)
        elif self._state.departures is not None and trains and not isinstance(hidden, DTensor):
            self._state.departures.append(typical_departure(hidden, vectors, anchors, mask, self._state.backend))
        if hidden.dtype == torch.float64:
            return vectors.double(), anchors.double(), mask.double(), backend
        return vectors, anchors, mask, backend

    def _reach(self, hidden: Tensor, vectors: Tensor) -> Tensor | None:
        """What the penalty takes for rounding: made once for each place and precision, but within a compiled graph."""
        of = (vectors.device, vectors.dtype, rounding(hidden, self._state.penalty))
        if torch.compiler.is_compiling():
            return reach(hidden, vectors, self._state.penalty)
        if of not in self._reaches:
            self._reaches[of] = reach(hidden, vectors, self._state.penalty)
        return self._reaches[of]

    def _constrained(self, target: Target, hidden: Tensor, operands: _Operands) -> Tensor:
        """The block's input passed through the op, whose penalty is kept."""
        vectors, anchors, mask, backend = operands
        penalty = self._state.penalty
        if isinstance(hidden, DTensor):
            hidden, tokens = constrain_sharded(hidden, self._index, vectors, anchors, mask, penalty, backend)
        else:
            rule = (penalty, self._reach(hidden, vectors), True, backend)
            hidden, tokens = Constrain.apply(hidden, vectors, anchors, mask, *rule)
        target.keep(self._column, tokens)
        return hidden


def _unseen(function: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    """``function``, of which selective checkpointing sees no operations.

    It matches those of a block that runs again with those of the first time by their order, and the op's are not there.
    """

    def call(hidden: Tensor) -> Any:
        if torch.compiler.is_compiling() or not isinstance(_get_current_dispatch_mode(), _SELECTIVE):
            return function(hidden)
        with _disable_current_modes():
            return function(hidden)

    return call


def runs_again() -> bool:
    """Whether autograd is running a backward now, as it is when a checkpointed block runs again."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
