"""The output of the last block as a constrained site: within the final norm, or on the way to it."""

import pytest
import torch

from procon.constraint import ProjectionConstraint
from procon.directions import Directions
from procon.errors import ProConError
from procon.models import find_decoder, observe_sites


def directions(blocks: int = 3, width: int = 32) -> Directions:
    unit = torch.randn(blocks + 1, width, generator=torch.Generator().manual_seed(0))
    ones = torch.ones(blocks + 1)
    return Directions(torch.nn.functional.normalize(unit, dim=-1)[:, None], ones[:, None], last_output=True)


def batch():
    generator = torch.Generator().manual_seed(2)
    return {"input_ids": torch.randint(5, 60, (2, 9), generator=generator)}


def by_definition(model, sites, anchors, mask):
    """Mean squared departure over tokens and sites, of what plain hooks see."""
    found = {}
    with observe_sites(find_decoder(model), lambda site, hidden: found.update({site: hidden})):
        model(**batch())
    basis = directions().basis[:, 0].to(next(model.parameters()).dtype)
    shifts = torch.stack([found[site] @ basis[site] for site in sites], -1) - anchors
    return (shifts.square() * mask[..., None]).sum() / (mask.sum() * len(sites))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("fuse", ["auto", "never"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("sites", [(3,), (0, 2, 3)])
def test_value_and_gradient_are_those_by_definition(tiny_model, family, fuse, sites, checkpointing):
    model = tiny_model(family).double().train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    generator = torch.Generator().manual_seed(3)
    anchors = torch.randn(2, 9, len(sites), generator=generator)
    mask = (torch.rand(2, 9, generator=generator) > 0.3).float()
    expected = by_definition(model, sites, anchors.double(), mask.double())
    (model(**batch()).logits.square().mean() + expected).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    made = ProjectionConstraint(directions(), blocks=list(sites), penalty="squared")
    with made.attach(model, fuse=fuse) as constraint:
        assert (3 in constraint.fused) is (fuse == "auto" and family not in ("gpt2", "gpt_neox"))
        constraint.set_target(anchors, mask)
        logits = model(**batch()).logits
        penalty = constraint.penalty()
        (logits.square().mean() + penalty).backward()
    torch.testing.assert_close(penalty.double(), expected, rtol=1e-5, atol=0)
    for name, gradient in gradients.items():
        found = model.get_parameter(name).grad
        torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()), msg=name)


def test_detached_it_is_the_model_again(tiny_model):
    model = tiny_model()
    before = model(**batch()).logits
    constraint = ProjectionConstraint(directions(), blocks=[3]).attach(model)
    assert constraint.acting == (3,)
    constraint.detach()
    assert torch.equal(model(**batch()).logits, before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert "forward" not in vars(model.model.norm)


def test_directions_without_that_row_cannot_constrain_it(tiny_model, random_directions):
    with pytest.raises(ProConError, match="last"):
        ProjectionConstraint(random_directions(tiny_model()), blocks=["all", "last"])
