"""One constrained block by itself: what it hands on, what it keeps, what it refuses."""

from contextlib import ExitStack

import pytest
import torch
from torch import Tensor, nn

from procon.constraint.constrained_block import ConstrainedBlock
from procon.constraint.input_norm import InputNorm
from procon.constraint.sites import Site
from procon.constraint.target import State, Target
from procon.errors import ProConError
from procon.ops import constrain

B, T, D, K = 2, 5, 8, 2


class Block(nn.Module):
    """Reads its input through a norm, ``calls`` times, and takes more arguments by place and by name."""

    def __init__(self, calls: int = 1) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(D, eps=1e-6)
        nn.init.uniform_(self.norm.weight, 0.5, 1.5)
        self.calls = calls

    def forward(self, hidden_states: Tensor, more: Tensor, *rest: Tensor, scale: float = 1.0) -> Tensor:
        x = hidden_states + scale * self.norm(hidden_states) + more
        for each in rest:
            x = x + each
        for _ in range(self.calls - 1):
            x = x + self.norm(x)
        return x


def target(mask: Tensor | None = None, first_moving: int = 0) -> Target:
    make = torch.Generator().manual_seed(1)
    anchors = torch.randn(3, B, T, K, generator=make)
    return Target(anchors, torch.rand(B, T, generator=make) if mask is None else mask, "huber", "raw", first_moving)


@pytest.fixture(params=["within the norm", "before the block"])
def attached(request):
    """``attached(block)``: the state of a constraint on it, as the second of three blocks with index 4."""
    with ExitStack() as undo:

        def attach(block: Block) -> State:
            state = State("eager")
            norm = InputNorm(block.norm, 1e-6, "llama", 0.0) if request.param == "within the norm" else None
            ConstrainedBlock(state, 1, 4, {"raw": VECTORS}).attach(Site(block, False, norm), undo)
            return state

        attach.undo = undo
        yield attach


VECTORS = torch.randn(K, D, generator=torch.Generator().manual_seed(2))


def run(block: Block, leaf: Tensor) -> Tensor:
    return block(leaf * 1.0, torch.ones(D), torch.full((D,), 2.0), torch.full((D,), 3.0), scale=0.5)


@pytest.mark.parametrize("calls", [1, 2])
def test_the_block_computes_what_it_did_and_the_penalty_is_kept(attached, calls):
    block, make = Block(calls), torch.Generator().manual_seed(3)
    values, arriving = torch.randn(2, B, T, D, generator=make)
    plain, leaf = values.clone().requires_grad_(), values.clone().requires_grad_()
    expected = run(block, plain)
    state = attached(block)
    state.target = target()
    found = run(block, leaf)
    torch.testing.assert_close(found, expected)
    assert list(state.target.terms) == [1]
    _, penalty = constrain(plain, VECTORS, state.target.anchors[1], state.target.mask, penalty="huber")
    torch.testing.assert_close(state.target.terms[1].sum(), penalty)
    ((found * arriving).sum() + 3 * state.target.terms[1].sum()).backward()
    ((expected * arriving).sum() + 3 * penalty).backward()
    torch.testing.assert_close(leaf.grad, plain.grad)


def test_the_input_may_come_by_name(attached):
    block = Block()
    values = torch.randn(B, T, D)
    expected = block(hidden_states=values, more=torch.ones(D), scale=0.5)
    state = attached(block)
    state.target = target()
    leaf = values.clone().requires_grad_()
    torch.testing.assert_close(block(hidden_states=leaf * 1.0, more=torch.ones(D), scale=0.5), expected)
    assert state.target.terms[1].sum() > 0


def test_without_gradients_the_value_alone_is_kept(attached):
    block = Block()
    state = attached(block)
    state.target = target()
    with torch.no_grad():
        run(block, torch.randn(B, T, D))
        run(block, torch.randn(B, T, D))  # as often as there are metrics
        run(block, torch.randn(B, T + 1, D))  # and of another shape, as one that generates
    assert not state.target.terms
    assert state.target.values[1].sum() > 0


def test_inference(attached):
    block = Block()
    state = attached(block)
    state.target = target()
    with torch.inference_mode():
        run(block, torch.randn(B, T, D))
    assert state.target.values[1].sum() > 0


def test_what_cannot_move_has_no_penalty(attached):
    block = Block()
    state = attached(block)
    for first_moving, leaf in ((0, torch.randn(B, T, D)), (5, torch.randn(B, T, D, requires_grad=True))):
        state.target = target(first_moving=first_moving)
        run(block, leaf)
        assert state.target.terms == {1: None}
    state.target = target(first_moving=4)
    run(block, torch.randn(B, T, D, requires_grad=True))
    assert state.target.terms[1].sum() > 0


def test_a_target_is_of_one_forward_and_of_its_shape(attached):
    block = Block()
    state = attached(block)
    state.target = target()
    run(block, torch.randn(B, T, D, requires_grad=True))
    with pytest.raises(ProConError, match=r"^block 4 ran twice for one target: call set_target"):
        run(block, torch.randn(B, T, D, requires_grad=True))
    state.target = target(mask=torch.ones(B, T + 1))
    message = r"^block 4 got hidden states of shape \(2, 5, 8\) for a mask of shape \(2, 6\): if ranks share a sequence"
    with pytest.raises(ProConError, match=message):
        run(block, torch.randn(B, T, D, requires_grad=True))


def test_a_training_forward_needs_a_target(attached):
    block = Block()
    state = attached(block)
    with pytest.raises(ProConError, match=r"^a training forward ran without anchors while the constraint is attached"):
        run(block, torch.randn(B, T, D))
    state.enabled = False
    run(block, torch.randn(B, T, D))
    state.enabled = True
    with torch.no_grad():
        run(block, torch.randn(B, T, D))
    block.eval()
    run(block, torch.randn(B, T, D))


def test_detached_it_is_as_it_was(attached):
    block = Block()
    state = attached(block)
    attached.undo.close()
    assert not block._forward_pre_hooks
    assert "forward" not in vars(block.norm)
    run(block, torch.randn(B, T, D))
    assert state.target is None
