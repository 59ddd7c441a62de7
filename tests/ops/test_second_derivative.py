"""No second derivative is silently wrong: whatever asks for one through the op is refused."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from procon.errors import ProConError
from procon.ops import constrain, project, projection_penalty, rms_norm_constrain

SIZE = 16


def norm(x: Tensor, v: Tensor, r: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return rms_norm_constrain(x, v, 1e-6, r, backend=backend)


#: Of states, a norm's weight and directions: a loss that leads through the op.
LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor, str], Tensor]] = {
    "constrain": lambda x, v, r, backend: sum(t.pow(3).sum() for t in constrain(x, r, backend=backend)),
    "constrain, penalty alone": lambda x, v, r, backend: constrain(x, r, backend=backend)[1],
    "rms_norm_constrain": lambda x, v, r, backend: sum(t.pow(3).sum() for t in norm(x, v, r, backend)),
    "rms_norm_constrain, penalty alone": lambda x, v, r, backend: norm(x, v, r, backend)[1],
    "projection_penalty": lambda x, v, r, backend: projection_penalty(x, r, backend=backend),
    "project": lambda x, v, r, backend: project(x, r, backend=backend).square().sum(),
}

#: Of a first derivative and what it was taken by: the second.
WAYS: dict[str, Callable[[Tensor, Tensor], object]] = {
    "autograd.grad": lambda first, by: torch.autograd.grad(first, by),
    ".backward()": lambda first, by: first.backward(),
}


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("by", ["leaf", "hidden", "upstream"])
@pytest.mark.parametrize("loss", LOSSES)
def test_of_the_op(loss, by, way, backend, device):
    """By a leaf below the hidden states, by these, and by the gradient that arrives: each has another way as well."""
    make = torch.Generator().manual_seed(0)
    leaf, v, r = (torch.randn(shape, generator=make).to(device) for shape in ((5, SIZE), (SIZE,), (2, SIZE)))
    leaf.requires_grad_()
    hidden = leaf * 2
    found = LOSSES[loss](hidden, v.requires_grad_(), r, backend)
    upstream = torch.ones_like(found, requires_grad=True)
    variable = {"leaf": leaf, "hidden": hidden, "upstream": upstream}[by]
    firsts = torch.autograd.grad(
        found, (leaf, v) if "rms" in loss and "alone" not in loss else (leaf,), upstream, create_graph=True
    )
    for first in firsts:
        with pytest.raises(ProConError, match="no second derivative"):
            WAYS[way](first.sum() + variable.pow(3).sum(), variable)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("fuse", ["auto", "never"])
def test_of_an_attached_model(fuse, way, request):
    pytest.importorskip("transformers")
    from procon.constraint import ProjectionConstraint

    model = request.getfixturevalue("tiny_model")(attn_implementation="eager")
    ids = torch.randint(5, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    directions = request.getfixturevalue("random_directions")(model)
    with ProjectionConstraint(directions).attach(model, fuse=fuse) as constraint:
        constraint.set_target(torch.randn(2, 9, len(constraint.blocks)), torch.ones(2, 9))
        loss = model(input_ids=ids).logits.square().mean() + 0 * constraint.penalty()
        weights = [*model.parameters()]
        firsts = torch.autograd.grad(loss, weights, create_graph=True)
        with pytest.raises(ProConError, match="no second derivative"):
            WAYS[way](sum(first.square().sum() for first in firsts), weights)
