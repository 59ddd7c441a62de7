"""Copies of a constrained model are free of the constraint, however they are made."""

import copy
import io
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.optim.swa_utils import AveragedModel

from procon.constraint import ProjectionConstraint
from procon.errors import ProConError

IDS = torch.randint(5, 60, (2, 6), generator=torch.Generator().manual_seed(0))
ANCHORS, MASK = torch.zeros(2, 6, 3), torch.ones(2, 6)


def by_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


def averaged(model):
    return AveragedModel(model).module


def assert_plain(twin, model) -> None:
    """``twin`` trains without a target and gives what ``model`` gives; its weights are its own."""
    with torch.no_grad():
        expected = model.eval()(input_ids=IDS).logits
    model.train()
    output = twin.train()(input_ids=IDS).logits
    torch.testing.assert_close(output, expected)
    output.square().mean().backward()
    assert all(parameter.grad is not None for parameter in twin.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


# Older transformers put functions of the package kernels into a model, which then cannot be pickled.
@pytest.mark.parametrize("fuse", ["auto", "never"])
@pytest.mark.parametrize("make", [copy.deepcopy, averaged, pytest.param(by_torch_save, marks=pytest.mark.newest)])
def test_copies_are_free(tiny_model, random_directions, make, fuse):
    model = tiny_model().train()
    with ProjectionConstraint(random_directions(model)).attach(model, fuse=fuse) as constraint:
        twin = make(model)
        assert_plain(twin, model)
        # With a target, which the copy's forward does not take.
        constraint.set_target(ANCHORS, MASK)
        assert_plain(make(model), model)
        with pytest.raises(ProConError, match=r"passed 0 of 3|ran without gradients"):
            constraint.penalty()
        twin(input_ids=IDS)
        model(input_ids=IDS)
        constraint.penalty()
    # The copy can be constrained itself, and copied again.
    with ProjectionConstraint(random_directions(model)).attach(twin, fuse=fuse) as constraint:
        assert constraint.fused == ((0, 1, 2) if fuse == "auto" else ())
        constraint.set_target(ANCHORS, MASK)
        twin(input_ids=IDS)
        constraint.penalty()
        make(twin)


@pytest.mark.newest
@pytest.mark.parametrize("fuse", ["auto", "never"])
def test_who_loads_a_saved_copy_needs_no_procon(tiny_model, random_directions, fuse):
    model = tiny_model()
    with ProjectionConstraint(random_directions(model)).attach(model, fuse=fuse):
        assert b"procon" not in pickle.dumps(model)


@pytest.mark.parametrize("fuse", ["auto", "never"])
def test_norms_that_an_adapter_copies_after_attaching(tiny_model, random_directions, fuse):
    model = tiny_model().train()
    constraint = ProjectionConstraint(random_directions(model)).attach(model, fuse=fuse)
    adapted = get_peft_model(
        model, LoraConfig(target_modules=["q_proj"], modules_to_save=["input_layernorm"], task_type="CAUSAL_LM")
    )
    constraint.set_target(ANCHORS, MASK)
    adapted(input_ids=IDS)
    if fuse == "auto":  # the copies work now, and the norms that do the constraint's work do not
        with pytest.raises(ProConError, match="passed 0 of 3 constrained blocks"):
            constraint.penalty()
    else:
        constraint.penalty()
    constraint.detach()
    adapted(input_ids=IDS).logits.sum().backward()
