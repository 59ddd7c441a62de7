"""The constraint on DTensors, on one rank: ranks that split the tokens are in ``training/test_distributed.py``."""

from contextlib import ExitStack

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from procon.constraint.constrained_block import ConstrainedBlock
from procon.constraint.sharded_input import constrain_sharded
from procon.constraint.target import State, Target
from procon.errors import ProConError
from procon.ops import constrain

SHAPE, WIDTH = (2, 6), 16


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield DeviceMesh("cpu", [0])
    dist.destroy_process_group()


def placed(tensor: torch.Tensor, mesh: DeviceMesh, placement) -> DTensor:
    return DTensor.from_local(tensor, mesh, [placement], run_check=False)


def given() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Directions, anchors and mask."""
    make = torch.Generator().manual_seed(0)
    rows = SHAPE[0] * SHAPE[1]
    return torch.randn(1, WIDTH, generator=make), torch.randn(rows, 1, generator=make), torch.rand(rows, generator=make)


@pytest.mark.parametrize("placement", [Replicate(), Shard(0), Shard(1), Shard(-2)])
def test_value_and_gradient_are_those_of_the_op(mesh, placement):
    direction, anchor, weight = given()
    values, arriving = torch.randn(*SHAPE, WIDTH), torch.randn(*SHAPE, WIDTH)
    leaf, plain = (values.clone().requires_grad_() for _ in range(2))
    hidden = placed(leaf, mesh, placement)
    passed, penalty = constrain_sharded(hidden, 3, direction, anchor, weight, "squared", "eager")
    assert (passed.placements, passed.shape, passed.stride()) == (hidden.placements, hidden.shape, hidden.stride())
    ((passed.to_local() * arriving).sum() + 3 * penalty.sum()).backward()
    same, expected = constrain(plain, direction, anchor.view(*SHAPE, 1), weight.view(SHAPE), penalty="squared")
    ((same * arriving).sum() + 3 * expected).backward()
    torch.testing.assert_close(penalty, expected[None])
    torch.testing.assert_close(leaf.grad, plain.grad)


def test_rows_that_no_rank_has_whole_are_refused():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = DeviceMesh("cpu", [[0]])
        message = r"^block 3 got hidden states with placement .*, of which no rank has whole rows"
        for last in (Shard(2), Shard(-1), Partial()):
            hidden = DTensor.from_local(torch.randn(*SHAPE, WIDTH), mesh, [Replicate(), last], run_check=False)
            with pytest.raises(ProConError, match=message):
                constrain_sharded(hidden, 3, *given(), "squared", "eager")
    finally:
        dist.destroy_process_group()


class _Local(nn.Module):
    """A block under a parallel plan: computes with its rank's part."""

    def forward(self, hidden_states: DTensor) -> torch.Tensor:
        return 2 * hidden_states.to_local()


def test_a_block_under_a_parallel_plan(mesh):
    vectors, anchors, mask = given()
    anchors, mask = anchors.view(1, *SHAPE, 1), mask.view(SHAPE)
    block, state = _Local(), State("squared", "eager")
    with ExitStack() as undo:
        ConstrainedBlock(state, 0, 0, vectors).attach(block, None, undo)
        state.target = Target(anchors, mask, 0)
        leaf = torch.randn(*SHAPE, WIDTH, requires_grad=True)
        torch.testing.assert_close(block(placed(leaf, mesh, Shard(1))), 2 * leaf)
        state.target.terms[0].sum().backward()
        again = leaf.detach().clone().requires_grad_()
        _, expected = constrain(again, vectors, anchors[0], mask)
        expected.backward()
        torch.testing.assert_close(state.target.terms[0].sum(), expected)
        torch.testing.assert_close(leaf.grad, again.grad)
