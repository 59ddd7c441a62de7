"""How far tokens moved, in units of the gap: the penalties give what the definition gives, in float64."""

import pytest
import torch

from procon.constraint import ProjectionConstraint
from procon.directions import Directions
from procon.errors import ProConError


def directions_with_gaps(model, count: int) -> Directions:
    blocks, width = model.config.num_hidden_layers, model.config.hidden_size
    random = torch.randn(blocks, width, count, generator=torch.Generator().manual_seed(2))
    basis = torch.linalg.qr(random).Q.mT.contiguous()
    gap = 0.5 + torch.arange(blocks).float()
    return Directions(basis, gap[:, None].expand(blocks, count).contiguous())


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(5, 60, (2, 9), generator=torch.Generator().manual_seed(3))}


def defined(model, directions, batch, anchors, mask, power: int, moving: slice) -> torch.Tensor:
    """Mean over tokens and blocks of ``sum_k |<r_lk, x_l[t]> - z0_lk[t]| ** power``, in units of each block's gap."""
    states = model(**batch, output_hidden_states=True).hidden_states[:-1]
    blocks, k = len(states), directions.basis.shape[1]
    shifts = torch.stack(
        [x @ r.double().T / gap for x, r, gap in zip(states, directions.basis, directions.gaps.double(), strict=True)],
        -2,
    )
    shifts = shifts - anchors.double().unflatten(-1, (blocks, k)) / directions.gaps.double()
    return (shifts.abs().pow(power).sum(-1)[..., moving].mean(-1) * mask).sum() / mask.sum()


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("units", ["raw", "gap"])
@pytest.mark.parametrize(("penalty", "power"), [("absolute", 1), ("squared", 2)])
@pytest.mark.parametrize("first", [0, 1], ids=["all blocks move", "the first does not"])
def test_the_shift_is_the_definition(tiny_model, batch, penalty, power, units, count, first):
    model = tiny_model().double()
    model.get_input_embeddings().requires_grad_(first == 0)
    directions = directions_with_gaps(model, count)
    random = torch.Generator().manual_seed(4)
    anchors = torch.randn(2, 9, count * model.config.num_hidden_layers, generator=random)
    mask = (torch.rand(2, 9, generator=random) < 0.6).float()
    with ProjectionConstraint(directions, penalty=penalty, units=units).attach(model) as constraint:
        constraint.set_target(anchors, mask)
        model(**batch)
        constraint.penalty()
        whole, share = constraint.shift(), constraint.shift(torch.tensor(100.0))
        constraint.set_target(anchors, mask)
        with torch.no_grad():
            model(**batch)
            without = constraint.shift()
    expected = defined(model, directions, batch, anchors, mask, power, slice(first, None))
    assert not whole.requires_grad
    # Anchors, directions and gaps are float32.
    assert whole.item() == pytest.approx(expected.item(), rel=1e-6)
    assert share.item() == pytest.approx(expected.item() * mask.sum().item() / 100, rel=1e-6)
    everywhere = defined(model, directions, batch, anchors, mask, power, slice(0, None))
    assert without.item() == pytest.approx(everywhere.item(), rel=1e-6)


@pytest.mark.parametrize(("penalty", "power"), [("absolute", 1), ("squared", 2)])
def test_one_sided_it_is_that_of_the_fall_and_blocks_count_alike(tiny_model, batch, penalty, power):
    model = tiny_model().double()
    directions = directions_with_gaps(model, 1)
    blocks, mask = directions.block_count, torch.ones(2, 9)
    states = model(**batch, output_hidden_states=True).hidden_states[:-1]
    projections = torch.stack([x @ r.double() for x, r in zip(states, directions.basis[:, 0], strict=True)], -1)
    moved = torch.randn(2, 9, blocks, generator=torch.Generator().manual_seed(6)).double()
    weights = torch.tensor([0.5, 1.0, 1.5])
    found = ProjectionConstraint(directions, penalty=penalty, sides="fall", weights=weights)
    with found.attach(model) as constraint:
        constraint.set_target((projections - moved).detach().float(), mask)
        model(**batch)
        constraint.penalty()
        shift = constraint.shift()
    expected = (-moved / directions.gaps[:, 0]).clamp_min(0).pow(power).mean()
    # Anchors are float32.
    assert shift.item() == pytest.approx(expected.item(), rel=1e-5)


def test_what_gives_no_shift_says_so(tiny_model):
    model = tiny_model()
    constraint = ProjectionConstraint(directions_with_gaps(model, 1)).attach(model)
    for set_target, message in (
        (constraint.release, "no target is set"),
        (constraint.rest, "no target is set"),
        (
            lambda: constraint.set_target(torch.zeros(1, 2, 3), torch.ones(1, 2), penalty="huber"),
            "penalty 'huber' does not show how far tokens moved",
        ),
    ):
        set_target()
        with pytest.raises(ProConError, match=message):
            constraint.shift()
    constraint.detach()
