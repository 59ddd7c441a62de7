"""Blocks that do not count alike: values and gradients by definition, and weights that are none."""

import pytest
import torch

from procon.constraint import ProjectionConstraint
from procon.directions import Directions
from procon.errors import ProConError

WEIGHTS = torch.tensor([0.25, 2.0, 0.75])


def directions(k: int = 1) -> Directions:
    make = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(3, 32, k, generator=make)).Q.mT.contiguous()
    gap = torch.rand(3, generator=make) + 0.5
    return Directions(basis, gap[:, None].expand(3, k))


def batch(k: int, blocks: int = 3) -> tuple[dict, torch.Tensor, torch.Tensor]:
    make = torch.Generator().manual_seed(3)
    ids = torch.randint(5, 60, (2, 9), generator=make)
    anchors = torch.randn(2, 9, blocks * k, generator=make)
    return {"input_ids": ids}, anchors, (torch.rand(2, 9, generator=make) < 0.6).float()


def run(model, given, k=1, *, fuse="auto", backward=True, **settings) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    with ProjectionConstraint(given, **{"penalty": "squared", **settings}).attach(model, fuse=fuse) as constraint:
        inputs, anchors, mask = batch(k, len(constraint.blocks))
        constraint.set_target(anchors, mask)
        with torch.set_grad_enabled(backward):
            model(**inputs)
            penalty = constraint.penalty()
        if backward:
            penalty.backward()
    return penalty.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def by_definition(model, given, k: int, weights: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    inputs, anchors, mask = batch(k)
    states = model(**inputs, output_hidden_states=True).hidden_states
    total = 0.0
    for block, anchor in enumerate(anchors.unflatten(-1, (3, k)).unbind(2)):
        error = (states[block] @ given.basis[block].T - anchor) / given.gaps[block, 0]
        total = total + weights[block] * (error.square().sum(-1) * mask).sum()
    penalty = total / (3 * mask.sum())
    penalty.backward()
    return penalty.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("fuse", ["auto", "never"])
@pytest.mark.parametrize("k", [1, 2])
def test_value_and_gradient_by_definition(tiny_model, k, fuse):
    model, given = tiny_model(), directions(k)
    found = run(model, given, k, fuse=fuse, units="gap", weights=WEIGHTS)
    expected = by_definition(model, given, k, WEIGHTS)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=0)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert (found[1][name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-9, name
    value, _ = run(model, given, k, fuse=fuse, units="gap", weights=WEIGHTS, backward=False)
    torch.testing.assert_close(value, found[0])


def test_a_block_that_cannot_move_leaves_the_others_their_weights(tiny_model):
    model, given = tiny_model(), directions()
    model.requires_grad_(False)
    model.model.layers[0].mlp.requires_grad_(True)  # so the first block's input cannot move
    whole, _ = run(model, given, weights=WEIGHTS)
    parts = []
    for block in (1, 2):
        weights = torch.full((3,), 1e-30)
        weights[block] = 1.0
        parts.append(WEIGHTS[block] * run(model, given, weights=weights)[0])
    torch.testing.assert_close(whole, sum(parts))


def test_each_forward_has_the_weights_of_its_units(tiny_model):
    """Probes are in units of the gap, whatever the training tokens are in."""
    model, given = tiny_model(), directions()
    by_units = {"raw": WEIGHTS, "gap": WEIGHTS.flip(0)}
    for units, weights in by_units.items():
        found, _ = run(model, given, units=units, weights=by_units)
        torch.testing.assert_close(found, run(model, given, units=units, weights=weights)[0], rtol=0, atol=0)
    inputs, anchors, mask = batch(1)
    with ProjectionConstraint(given, penalty="squared", units="raw", weights=by_units).attach(model) as constraint:
        constraint.set_target(anchors, mask, units="gap")
        model(**inputs)
        torch.testing.assert_close(constraint.penalty().detach(), found)


def test_alike_is_without(tiny_model):
    model, given = tiny_model(), directions()
    value, gradients = run(model, given)
    same, others = run(model, given, weights=[1, 1, 1])
    assert torch.equal(value, same)
    assert all(torch.equal(gradient, others[name]) for name, gradient in gradients.items())


def test_they_may_change_between_steps(tiny_model):
    model, given = tiny_model(), directions()
    constraint = ProjectionConstraint(given, blocks=[1, 2])
    assert constraint.weights is None
    constraint.weights = [0.5, 1.5]
    assert {units: each.tolist() for units, each in constraint.weights.items()} == {
        "raw": [0.5, 1.5],
        "gap": [0.5, 1.5],
    }
    constraint.weights = None
    assert constraint.weights is None
    assert run(model, given, weights=2 * WEIGHTS)[0] == pytest.approx(2 * run(model, given, weights=WEIGHTS)[0].item())


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0, 1.0], r"weights have shape \[2\]: give \[3\]"),
        (torch.ones(3, 1), r"weights have shape \[3, 1\]"),
        ([1.0, 0.0, 2.0], "give finite numbers above 0"),
        ([1.0, -1.0, 2.0], "give finite numbers above 0"),
        ([1.0, float("nan"), 2.0], "give finite numbers above 0"),
        ([1.0, float("inf"), 2.0], "give finite numbers above 0"),
        (["a", "b", "c"], "weights are .*: give one number for each"),
        ({"raw": [1.0, 1.0, 1.0]}, "weights are given for raw: give them for raw and for gap"),
        ({"raw": [1.0, 1.0, 1.0], "gap": [1.0]}, r"weights have shape \[1\]"),
        ("causal", "weights are 'causal': give one number for each"),
    ],
)
def test_weights_that_are_none(weights, message):
    with pytest.raises(ProConError, match=message):
        ProjectionConstraint(directions(), weights=weights)
    constraint = ProjectionConstraint(directions())
    with pytest.raises(ProConError, match=message):
        constraint.weights = weights
