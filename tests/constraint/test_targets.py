"""A target belongs to its forward: several targets before one backward give the gradients of the definition, in float64.

Also when blocks run again within backward, as gradient checkpointing has them do.
"""

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from procon.constraint import ProjectionConstraint
from procon.models import find_decoder

RELATIVE = 1e-5


def batches(count: int, length: int = 6) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Token ids, anchors and masks; the shapes are the same, so that one target could pass for another."""
    random = torch.Generator().manual_seed(5)
    return [
        (
            torch.randint(5, 60, (2, length), generator=random),
            torch.randn(2, length, 2, generator=random),
            (torch.rand(2, length, generator=random) < 0.7).float(),
        )
        for _ in range(count)
    ]


def gradients(model) -> list[torch.Tensor]:
    return [parameter.grad for parameter in model.parameters()]


def definition(model, directions, ids, anchors, mask) -> torch.Tensor:
    """Loss and penalty of one forward, from the hidden states that the model gives out."""
    output = model(input_ids=ids, output_hidden_states=True)
    inputs = torch.stack(output.hidden_states[:2], -2)  # [B, T, blocks, D]
    error = (inputs * directions.first.double()).sum(-1) - anchors
    return output.logits.square().mean() + (error.square().mean(-1) * mask).sum() / mask.sum()


def one_graph(model, constraint, given) -> None:
    """A target before each forward, then one backward: preference pairs, micro-batches that share a graph."""
    loss = 0.0
    for ids, anchors, mask in given:
        constraint.set_target(anchors, mask)
        loss = loss + model(input_ids=ids).logits.square().mean() + constraint.penalty()
    loss.backward()
    constraint.release()


def next_target_first(model, constraint, given) -> None:
    """Each backward after the next batch's target is set, as a loop that prepares one batch ahead has it."""
    constraint.set_target(*given[0][1:])
    for step, (ids, _, _) in enumerate(given):
        loss = model(input_ids=ids).logits.square().mean() + constraint.penalty()
        if step + 1 < len(given):
            constraint.set_target(*given[step + 1][1:])
        loss.backward()


def released_first(model, constraint, given) -> None:
    for ids, anchors, mask in given:
        constraint.set_target(anchors, mask)
        loss = model(input_ids=ids).logits.square().mean() + constraint.penalty()
        constraint.release()
        loss.backward()


def backwards_later(model, constraint, given) -> None:
    """All forwards, and then a backward each, the last forward's first."""
    losses = []
    for ids, anchors, mask in given:
        constraint.set_target(anchors, mask)
        losses.append(model(input_ids=ids).logits.square().mean() + constraint.penalty())
    for loss in reversed(losses):
        loss.backward()


def plain(model) -> None:
    pass


def checkpointing(model) -> None:
    model.gradient_checkpointing_enable({"use_reentrant": False})


def offloading(model) -> None:
    model.gradient_checkpointing_enable({"use_reentrant": False}, offload=True)


def wrapped(model) -> None:
    blocks = find_decoder(model).blocks
    for index, block in enumerate(list(blocks)):
        blocks[index] = checkpoint_wrapper(block)


@pytest.mark.parametrize("fuse", ["auto", "never"])
@pytest.mark.parametrize("checkpoints", [plain, checkpointing, offloading, wrapped])
@pytest.mark.parametrize(
    ("loop", "count"),
    [(one_graph, 2), (one_graph, 4), (next_target_first, 3), (released_first, 2), (backwards_later, 3)],
    ids=["pair", "accumulation in one graph", "next target first", "released first", "backwards later"],
)
def test_every_forward_has_the_gradient_of_its_own_target(tiny_model, random_directions, loop, count, checkpoints, fuse):
    model = tiny_model(num_hidden_layers=2).double().train()
    directions = random_directions(model)
    given = batches(count)
    for batch in given:
        definition(model, directions, *batch).backward()
    expected = [gradient.clone() for gradient in gradients(model)]
    model.zero_grad()
    with ProjectionConstraint(directions, penalty="squared").attach(model, fuse=fuse) as constraint:
        checkpoints(model)
        loop(model, constraint, given)
    for found, wanted in zip(gradients(model), expected, strict=True):
        assert (found - wanted).norm() <= RELATIVE * wanted.norm()
