"""Where a block's input, or the last one's output, meets the op: within the norm that reads it, or on the way there."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode
from torch.utils.checkpoint import _CachedTorchDispatchMode, _CachingTorchDispatchMode

from procon.constraint.copies import Arguments, Hook, ModuleForward, PreForward
from procon.constraint.departure import typical_departure
from procon.constraint.input_norm import InputNorm
from procon.constraint.reach import is_the_same
from procon.constraint.sharded_input import check_placements, constrain_sharded
from procon.constraint.sites import Site
from procon.constraint.target import State, Target, on_device
from procon.errors import ProConError
from procon.models import block_input, block_output
from procon.ops import outside_backward, rms_norm
from procon.ops.operators import folded, version_of
from procon.ops.prepared import constrain_tokens, rms_norm_constrain_tokens
from procon.settings import Units

logger = logging.getLogger(__name__)

_Given = ParamSpec("_Given")
_Made = TypeVar("_Made")

#: What selective checkpointing sees operations with: the first time, and when a block runs again.
_SELECTIVE = (_CachingTorchDispatchMode, _CachedTorchDispatchMode)

#: Directions ``[K, D]`` and anchors ``[N, K]``, folded for the backend, mask ``[N]``, and the backend.
_Operands = tuple[Tensor, Tensor, Tensor, str]


class ConstrainedBlock:
    """One constrained block of a model; with the index after the last one, the last one's output.

    A checkpointed block runs again within backward, when its target may be released, or be the next forward's already.
    The gradient does not depend on it: the op keeps what its backward needs of the target from the forward that made
    the penalty. So a block that runs again only has to save the tensors that it saved then.
    """

    def __init__(self, state: State, column: int, index: int, vectors: Mapping[Units, Tensor]) -> None:
        """``column`` of each target belongs to block ``index``, whose directions are ``vectors [K, D]``, by unit."""
        self._state = state
        self._column = column
        self._index = index
        self._vectors = {units: {tensor.device: tensor} for units, tensor in vectors.items()}
        self._operand: dict[tuple[Units, torch.device, str], Tensor] = {}
        self._norm_did_it = True

    def attach(self, site: Site, undo: ExitStack) -> None:
        """Put the op into the site's norm, or on the way if there is none; closing ``undo`` takes it out again."""
        block, norm = site.block, site.norm
        if site.is_output:
            hook = self._through_output(block) if norm is None else self._note_output
            undo.callback(block.register_forward_hook(Hook(hook)).remove)
        else:
            hook = self._through(block) if norm is None else self._note_input
            undo.callback(block.register_forward_pre_hook(Hook(hook), with_kwargs=True).remove)
        if norm is not None:
            norm.module.forward = ModuleForward(norm.module, self._within(norm))
            undo.callback(delattr, norm.module, "forward")

    def _through(self, block: nn.Module) -> PreForward:
        """A pre-hook for ``block``: its input passes through the op."""

        def pre_forward(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
            if not self._state.enabled or self._runs_again(block) or (target := self._target(block)) is None:
                return None
            hidden = block_input(args, kwargs)
            if (operands := self._operands(target, hidden)) is None:
                return None
            hidden = self._constrained(target, hidden, operands)
            if args:
                return (hidden, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": hidden}

        return _unseen(pre_forward)

    def _through_output(self, block: nn.Module) -> Callable[[nn.Module, tuple[Any, ...], Any], Any]:
        """A forward hook for ``block``: its output passes through the op."""

        def forward(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
            if not self._state.enabled or self._runs_again(block) or (target := self._target(block)) is None:
                return None
            hidden = block_output(output)
            if (operands := self._operands(target, hidden)) is None:
                return None
            hidden = self._constrained(target, hidden, operands)
            return hidden if isinstance(output, Tensor) else (hidden, *output[1:])

        return _unseen(forward)

    def _note_output(self, _module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        """A forward hook for a block whose output a norm reads that does the work."""
        self._note(block_output(output))

    def _note_input(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A pre-hook for a block whose norm does the work: that is what the norm should get."""
        self._note(block_input(args, kwargs))

    def _note(self, hidden: Tensor) -> None:
        if self._state.enabled and (target := self._state.target) is not None:
            target.called_with[self._column] = hidden, version_of(hidden)

    def _within(self, norm: InputNorm) -> Callable[[Tensor], Tensor]:
        """A forward for a block's first norm, which gives the penalty on the way."""
        module: Any = norm.module
        state = self._state
        rule: dict[str, Any] = {"casting": norm.casting, "offset": norm.offset, "backend": state.backend}

        def plain(hidden: Tensor) -> Tensor:
            return type(module).forward(module, hidden)

        def forward(hidden: Tensor) -> Tensor:
            if not self._state.enabled:
                return plain(hidden)
            if self._runs_again(module):
                if self._did_it(module, hidden):
                    return rms_norm(hidden, module.weight, norm.eps, **rule)
                return plain(hidden)
            if (target := self._target(module)) is None:
                return plain(hidden)
            if (given := target.called_with.pop(self._column, None)) is None:
                return plain(hidden)  # called once more, or by another block that shares it
            of_block = self._input_of_block(*given, hidden)
            did_it = of_block is hidden and not isinstance(hidden, DTensor)
            if torch.is_grad_enabled():
                self._norm_did_it = did_it
            if target.idle and self._did_it(module, hidden):
                return rms_norm(hidden, module.weight, norm.eps, **rule)
            if (operands := self._operands(target, of_block)) is None:
                return plain(hidden)
            if not did_it:
                passed = self._constrained(target, of_block, operands)
                return plain(passed if of_block is hidden else hidden)
            vectors, anchors, mask, backend = operands
            of_norm = (norm.casting, norm.offset, backend)
            normed, tokens = rms_norm_constrain_tokens(
                hidden, module.weight, norm.eps, vectors, anchors, mask, target.penalty, state.sides, *of_norm
            )
            target.keep(self._column, tokens)
            return normed

        return _unseen(forward)

    def _runs_again(self, module: nn.Module) -> bool:
        """Whether this is no forward of its own."""
        again = runs_again()
        if again and self._state.first_moving is None:
            self._target(module)  # without any target so far, it trains without the constraint
        return again

    def _did_it(self, module: nn.Module, hidden: Tensor) -> bool:
        """Whether the norm did the work in the forward that now runs again."""
        first_moving = self._state.first_moving
        if first_moving is None or not (module.training or self._state.target is not None):
            return False  # it had no target
        return hidden.requires_grad and self._index >= first_moving and self._norm_did_it

    def _input_of_block(self, given: Tensor, version: int, hidden: Tensor) -> Tensor:
        """What the block was called with: ``given``, or ``hidden``, which its norm gets, if that is the same."""
        if isinstance(hidden, DTensor) and not isinstance(given, DTensor):
            return hidden  # a parallel plan made it of the block's input
        if version_of(given) != version:
            raise ProConError(
                f"block {self._index} changes its input in place before its norm reads it: attach the constraint with "
                "fuse='never'"
            )
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
        """Directions, anchors and mask for the block's input; None if it cannot move, or the target is not its own."""
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
        if isinstance(hidden, DTensor):
            check_placements(hidden, self._index)
        if trains and not (hidden.requires_grad and self._index >= target.first_moving):
            # Nothing below this block trains, so its input, and with it the penalty's gradient, cannot move.
            target.terms[self._column] = None
            return None
        device = hidden.device
        by_column, mask, backend = target.on(device, self._state.backend)
        anchors = by_column[self._column]
        if torch.compiler.is_compiling():
            # A graph cannot ask whether it runs again, and would save what the op makes of the target of that time.
            anchors = outside_backward(anchors)
        vectors = self._directions(target.units, device, backend)
        # A graph would be compiled once more for the first step.
        noted = None if torch.compiler.is_compiling() else self._state.departures
        if noted is not None and trains and not isinstance(hidden, DTensor):
            noted.append(typical_departure(hidden, vectors, anchors, mask, self._state.backend))
        return vectors, anchors, mask, backend

    def _directions(self, units: Units, device: torch.device, backend: str) -> Tensor:
        """As the op takes them."""
        if torch.compiler.is_compiling():
            # A graph that keeps them would be compiled again when they are there.
            return folded(on_device(self._vectors[units], device), 0, backend)
        key = units, device, backend
        if key not in self._operand:
            self._operand[key] = folded(on_device(self._vectors[units], device), 0, backend)
        return self._operand[key]

    def _constrained(self, target: Target, hidden: Tensor, operands: _Operands) -> Tensor:
        """The block's input passed through the op, whose penalty is kept."""
        vectors, anchors, mask, backend = operands
        sides = self._state.sides
        if isinstance(hidden, DTensor):
            anchors, mask = anchors.view(*target.mask.shape, *vectors.shape[:-1]), mask.view(target.mask.shape)
            settings: dict[str, Any] = {"penalty": target.penalty, "sides": sides, "backend": backend}
            hidden, term = constrain_sharded(hidden, vectors, anchors, mask, **settings)
            tokens = term.unsqueeze(0)
        else:
            hidden, tokens = constrain_tokens(hidden, vectors, anchors, mask, target.penalty, sides, backend)
        target.keep(self._column, tokens)
        return hidden


def _unseen(function: Callable[_Given, _Made]) -> Callable[_Given, _Made]:
    """``function``, of which selective checkpointing sees no operations.

    It matches those of a block that runs again with those of the first time by their order, and the op's are not there.
    """

    def call(*args: _Given.args, **kwargs: _Given.kwargs) -> _Made:
        if torch.compiler.is_compiling() or not isinstance(_get_current_dispatch_mode(), _SELECTIVE):
            return function(*args, **kwargs)
        with _disable_current_modes():
            return function(*args, **kwargs)

    return call


def runs_again() -> bool:
    """Whether autograd is running a backward now, as it is when a checkpointed block runs again."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
