"""The constraint along several concepts, of which one has no direction at some blocks, by definition in float64."""

import pytest
import torch
from torch.utils.data import DataLoader

from procon.anchors import AnchoredCollator, Anchors
from procon.constraint import ProjectionConstraint
from procon.data import padding_collator
from procon.directions import Directions

PENALTIES = {"squared": torch.square, "absolute": torch.abs}


@pytest.fixture
def model(tiny_model):
    return tiny_model().double().eval()


@pytest.fixture
def directions(model) -> Directions:
    """One concept at all blocks, one at the last alone, and one at blocks 0 and 2."""
    random = torch.Generator().manual_seed(0)
    parts = [
        Directions.from_vectors(model, {block: torch.randn(32, generator=random) for block in blocks}, name=name)
        for name, blocks in (("everywhere", (0, 1, 2)), ("late", (2,)), ("here", (0, 2)))
    ]
    basis = torch.cat([part.basis for part in parts], 1)
    return Directions(basis, basis.any(-1).float(), concepts=("everywhere", "late", "here"))


def projections(model, directions, ids) -> torch.Tensor:
    """``[B, T, L, K]``, differentiable."""
    states = torch.stack(model(input_ids=ids, output_hidden_states=True).hidden_states[:3], 2)
    return torch.einsum("btld,lkd->btlk", states, directions.basis.to(states.dtype))


@pytest.mark.parametrize("fuse", ["auto", "never"])
@pytest.mark.parametrize("penalty", PENALTIES)
def test_value_and_gradient_by_definition(model, directions, penalty, fuse):
    """A vector that is not there adds nothing to the sum, and is counted in the mean over blocks all the same."""
    random = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 200, (2, 9), generator=random)
    mask = (torch.rand(2, 9, generator=random) < 0.7).float()
    z = projections(model, directions, ids)
    there = directions.basis.any(-1)
    # As recorded, an anchor of a vector of zeros is 0; and off the kinks, so that rounding decides nothing.
    anchors = (z.detach() + 0.3 + torch.rand(z.shape, generator=random).double()).float() * there
    terms = []
    for concept in range(3):
        for block in there[:, concept].nonzero().flatten().tolist():
            error = z[..., block, concept] - anchors[..., block, concept].double()
            terms.append((PENALTIES[penalty](error) * mask).sum() / mask.sum())
    expected = sum(terms) / 3
    assert len(terms) == 6
    expected.backward()
    wanted = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()

    with ProjectionConstraint(directions, penalty=penalty).attach(model, fuse=fuse) as constraint:
        assert constraint.blocks == (0, 1, 2)
        constraint.set_target(anchors.flatten(2), mask)
        model(input_ids=ids)
        found = constraint.penalty()
        found.backward()
    # Directions are kept in fp32.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    largest = max(gradient.norm() for gradient in wanted.values())
    assert largest > 0
    for name, parameter in model.named_parameters():
        if name in wanted:
            assert (parameter.grad - wanted[name]).norm() <= 1e-5 * wanted[name].norm() + 1e-7 * largest, name


@pytest.mark.parametrize("backend", ["eager", pytest.param("triton", marks=pytest.mark.slow)])
def test_a_model_beside_its_anchors_has_no_penalty(tiny_model, directions, samples, tokenizer, tmp_path, backend):
    model = tiny_model().eval()
    collator = padding_collator(tokenizer)
    anchors = Anchors.record(model, DataLoader(samples, 3, collate_fn=collator), directions, tmp_path, progress=False)
    batch = AnchoredCollator(collator, anchors)(samples[:3])
    recorded = batch["anchors"].unflatten(-1, (3, 3))
    there = directions.basis.any(-1)
    assert recorded[..., ~there].count_nonzero() == 0
    assert recorded[batch["constraint_mask"] > 0][:, there].all()
    with ProjectionConstraint(directions, penalty="absolute", backend=backend).attach(model) as constraint:
        constraint.set_target(batch.pop("anchors"), batch.pop("constraint_mask"))
        model(**batch)
        penalty = constraint.penalty()
        penalty.backward()
    assert 0 <= penalty.item() < 1e-5
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters() if parameter.grad is not None)
