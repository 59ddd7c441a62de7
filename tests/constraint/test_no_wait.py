"""A constrained step hands the device numbers once for a target, and never waits for it: counted by operation.

On a GPU each of these operations copies a number from the host or waits for one: which of them run does not depend on
the device.
"""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from procon.constraint import ProjectionConstraint, constrained_tokens
from procon.ops.autograd import Constrain

#: What makes a tensor of a number or a list of the host's, copies a tensor to another device or dtype, or reads one.
COPIES = ("_to_copy", "copy_", "scalar_tensor", "lift_fresh_copy", "index", "_local_scalar_dense", "item", "is_nonzero")

BLOCKS = {"one": [2], "all": "all"}


class Counted(TorchDispatchMode):
    """Counts the operations that run within it, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))

    @property
    def copies(self) -> dict[str, int]:
        return {name: self.calls[name] for name in COPIES if self.calls[name]}


def batch(constraint: ProjectionConstraint) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(3)
    ids = torch.randint(5, 60, (2, 9), generator=random)
    return ids, torch.randn(2, 9, len(constraint.blocks), generator=random), torch.ones(2, 9)


def step(model, constraint: ProjectionConstraint) -> dict[str, dict[str, int]]:
    """The copies of each part of a step."""
    ids, anchors, mask = batch(constraint)
    found = {}
    with Counted() as counted:
        constraint.set_target(anchors, mask)
    found["set_target"] = counted.copies
    with Counted() as counted:
        loss = model(input_ids=ids).logits.square().mean()
    found["forward"] = counted.copies
    with Counted() as counted:
        penalty = constraint.penalty()
    found["penalty"] = counted.copies
    with Counted() as counted:
        (loss + penalty).backward()
    found["backward"] = counted.copies
    return found


@pytest.mark.parametrize("fuse", ["auto", "never"])
@pytest.mark.parametrize("penalty", ["squared", "absolute"])
def test_copies_of_a_step(tiny_model, random_directions, fuse, penalty):
    """One for a target, whatever the number of blocks."""
    found = {}
    for name, blocks in BLOCKS.items():
        model = tiny_model()
        made = ProjectionConstraint(random_directions(model), blocks=blocks, penalty=penalty)
        with made.attach(model, fuse=fuse) as constraint:
            step(model, constraint)  # looks once whether the gradient arrives anywhere
            found[name] = step(model, constraint)
    model, ids = tiny_model(), batch(constraint)[0]
    with Counted() as plain:
        # As under the constraint: without a cache, transformers looks for packed sequences, which waits once.
        model(input_ids=ids, use_cache=False).logits.square().mean()
    assert found["one"] == found["all"]
    assert found["all"]["set_target"] == {"copy_": 1}
    assert found["all"]["penalty"] == {}
    # transformers' norm in float32 converts nothing, so there is nothing to save.
    assert found["all"]["forward"] == plain.copies


@pytest.mark.parametrize("penalty", ["squared", "absolute"])
def test_nothing_is_copied_for_a_number_of_the_batch(tiny_model, random_directions, penalty):
    """With blocks that cannot move, and with a count that is given."""
    model = tiny_model()
    model.model.embed_tokens.requires_grad_(False)  # so the first block's input cannot move
    made = ProjectionConstraint(random_directions(model), penalty=penalty)
    with made.attach(model) as constraint:
        step(model, constraint)
        ids, anchors, mask = batch(constraint)
        constraint.set_target(anchors, mask)
        model(input_ids=ids)
        count = constrained_tokens([{"constraint_mask": mask}])
        with Counted() as counted:
            for tokens in (None, 18.0, count):
                constraint.penalty(tokens)
        assert counted.copies == {}
        with Counted() as counted:
            constraint.penalty(3 * mask.sum())
        assert counted.copies == {}


def test_what_the_op_runs_for_a_block(tiny_model, random_directions):
    """One sum over the tokens for all blocks; and of each, what the op runs by itself, and a column of the anchors."""
    calls = {}
    for name, blocks in BLOCKS.items():
        model = tiny_model()
        with ProjectionConstraint(random_directions(model), blocks=blocks, penalty="squared").attach(
            model, fuse="never"
        ) as constraint:
            step(model, constraint)
            ids, anchors, mask = batch(constraint)
            with Counted() as counted:
                constraint.set_target(anchors, mask)
                (model(input_ids=ids).logits.square().mean() + constraint.penalty()).backward()
            calls[name] = counted.calls

    # What the engine adds to it is up to the version of torch.
    hidden, gradient = torch.randn(2, 9, 32, requires_grad=True).view(2, 9, 32), torch.ones(2, 9, 32)
    direction, anchors, mask = torch.ones(1, 32), torch.ones(18, 1), torch.ones(18)
    with Counted() as forward:
        made = Constrain.apply(hidden, direction, anchors, mask, "squared", None, True, "eager")
    with Counted() as backward:
        torch.autograd.grad(made, hidden, [gradient, mask])
    assert forward.calls.total() <= 14
    each = forward.calls + backward.calls + Counter(select=1)
    assert calls["all"] - calls["one"] == each + each
