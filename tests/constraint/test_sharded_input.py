"""The constraint on DTensors, on one rank: ranks that split the tokens are in ``training/test_distributed.py``."""

from contextlib import ExitStack

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from procon.constraint.constrained_block import ConstrainedBlock
from procon.constraint.sharded_input import check_placements, constrain_sharded
from procon.constraint.sites import Site
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


@pytest.mark.parametrize("placement", [Replicate(), Shard(0), Shard(1), Shard(-2)])
def test_value_and_gradient_are_those_of_the_op(mesh, placement):
    direction, anchor, weight = torch.randn(WIDTH), torch.randn(SHAPE), torch.rand(SHAPE)
    values, arriving = torch.randn(*SHAPE, WIDTH), torch.randn(*SHAPE, WIDTH)
    found = []
    for sharded in (True, False):
        leaf = values.clone().requires_grad_()
        if sharded:
            hidden = placed(leaf, mesh, placement)
            check_placements(hidden, 3)
            passed, penalty = constrain_sharded(hidden, direction, anchor, weight, penalty="huber", backend="eager")
            assert passed.placements == hidden.placements
            assert passed.shape == hidden.shape
            assert passed.stride() == hidden.stride()
            passed = passed.to_local()
        else:
            passed, penalty = constrain(leaf, direction, anchor, weight, penalty="huber", backend="eager")
        ((passed * arriving).sum() + 3 * penalty).backward()
        found.append((passed.detach(), penalty.detach(), leaf.grad))
    assert not isinstance(found[0][1], DTensor)
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("placement", [Shard(2), Shard(-1), Partial()])
def test_rows_that_no_rank_has_whole_are_refused(mesh, placement):
    hidden = placed(torch.randn(*SHAPE, WIDTH), mesh, placement)
    with pytest.raises(ProConError, match=r"^block 3 got hidden states with placement .*, of which no rank has whole"):
        check_placements(hidden, 3)


def test_one_bad_placement_of_two_is_refused():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = DeviceMesh("cpu", [[0]])
        for placements in ([Replicate(), Shard(2)], [Shard(2), Shard(0)]):
            hidden = DTensor.from_local(torch.randn(*SHAPE, WIDTH), mesh, placements, run_check=False)
            with pytest.raises(ProConError, match="of which no rank has whole rows"):
                check_placements(hidden, 0)
        check_placements(DTensor.from_local(torch.randn(2, 3, 4), mesh, [Shard(0), Shard(1)], run_check=False), 0)
    finally:
        dist.destroy_process_group()


def test_the_backend_is_the_one_asked_for(mesh, monkeypatch):
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    hidden = placed(torch.randn(*SHAPE, WIDTH), mesh, Replicate())
    rest = torch.randn(WIDTH), torch.zeros(SHAPE), torch.ones(SHAPE)
    with pytest.raises(ProConError, match=r"^backend is 'triton' but hidden is on cpu"):
        constrain_sharded(hidden, *rest, penalty="squared", backend="triton")


class _Local(nn.Module):
    """A block under a parallel plan: computes with its rank's part."""

    def forward(self, hidden_states: DTensor) -> torch.Tensor:
        return 2 * hidden_states.to_local()


@pytest.mark.parametrize("sides", ["both", "fall"])
def test_a_block_under_a_parallel_plan(mesh, sides):
    vectors, make = torch.randn(1, WIDTH), torch.Generator().manual_seed(0)
    anchors, mask = torch.randn(1, *SHAPE, 1, generator=make), torch.rand(SHAPE, generator=make)
    block, state = _Local(), State("eager", sides)
    with ExitStack() as undo:
        ConstrainedBlock(state, 0, 0, {"raw": vectors}).attach(Site(block, False, None), undo)
        state.target = Target(anchors, mask, "squared", "raw", 0)
        leaf = torch.randn(*SHAPE, WIDTH, requires_grad=True)
        out = block(placed(leaf, mesh, Shard(1)))
        torch.testing.assert_close(out, 2 * leaf)
        state.target.terms[0].sum().backward()
        again = leaf.detach().clone().requires_grad_()
        _, expected = constrain(again, vectors, anchors[0], mask, sides=sides)
        expected.backward()
        torch.testing.assert_close(state.target.terms[0].sum(), expected)
        torch.testing.assert_close(leaf.grad, again.grad)
        state.target = Target(anchors, mask, "squared", "raw", 0)
        with pytest.raises(ProConError, match=r"^block 0 got hidden states with placement .*, of which no rank has"):
            block(placed(leaf, mesh, Shard(2)))
