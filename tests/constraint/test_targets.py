"""A target belongs to its forward: several targets before one backward give the gradients of the definition.

In float64, and also when blocks run again within backward, as gradient checkpointing has them do.
"""

import weakref
from functools import partial

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from procon.constraint import ProjectionConstraint
from procon.errors import ProConError
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
    error = (inputs * directions.basis[:, 0].double()).sum(-1) - anchors
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


def wrapped(model, **settings) -> None:
    blocks = find_decoder(model).blocks
    for index, block in enumerate(list(blocks)):
        blocks[index] = checkpoint_wrapper(block, **settings)


def offloaded(model) -> None:
    """What is saved, block inputs too, comes back as another tensor, as from the CPU's memory."""

    def run(*args, **kwargs):
        with torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone):
            return checkpoint(*args, **kwargs, use_reentrant=False)

    wrapped(model, checkpoint_fn=run)


def selective(model) -> None:
    """Some results are kept: of matrix products, as is usual, and of what the op does too."""
    kept = [getattr(torch.ops.aten, name).default for name in ("mm", "sum", "new_empty")]
    wrapped(model, context_fn=partial(create_selective_checkpoint_contexts, kept))


@pytest.mark.parametrize("fuse", ["auto", "never"])
@pytest.mark.parametrize("checkpoints", [plain, checkpointing, wrapped, offloaded, selective])
@pytest.mark.parametrize(
    ("loop", "count"),
    [(one_graph, 2), (one_graph, 4), (next_target_first, 3), (released_first, 2), (backwards_later, 3)],
    ids=["pair", "accumulation in one graph", "next target first", "released first", "backwards later"],
)
def test_every_forward_has_the_gradient_of_its_own_target(
    tiny_model, random_directions, loop, count, checkpoints, fuse
):
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


@pytest.mark.parametrize("fuse", ["auto", "never"])
@pytest.mark.parametrize("checkpoints", [plain, checkpointing])
def test_forwards_without_gradients_before_and_after(tiny_model, random_directions, checkpoints, fuse):
    """For a reference's logits, or for metrics; of another length too."""
    model = tiny_model(num_hidden_layers=2).double().train()
    directions = random_directions(model)
    (batch,) = batches(1)
    definition(model, directions, *batch).backward()
    expected = [gradient.clone() for gradient in gradients(model)]
    model.zero_grad()
    with ProjectionConstraint(directions, penalty="squared").attach(model, fuse=fuse) as constraint:
        checkpoints(model)
        constraint.set_target(*batch[1:])
        with torch.no_grad():
            reference = model(input_ids=batch[0]).logits
            model(input_ids=batch[0][:, :3])
        logits = model(input_ids=batch[0]).logits
        assert torch.equal(logits, reference)
        with torch.no_grad():
            model(input_ids=batch[0])
        (logits.square().mean() + constraint.penalty()).backward()
    for found, wanted in zip(gradients(model), expected, strict=True):
        assert (found - wanted).norm() <= RELATIVE * wanted.norm()


@pytest.mark.parametrize("fuse", ["auto", "never"])
@pytest.mark.parametrize("frozen", [False, True])
def test_value_without_gradients(tiny_model, random_directions, frozen, fuse):
    """Validation: the value by definition, whatever trains, of the last forward."""
    model = tiny_model(num_hidden_layers=2).double().eval().requires_grad_(not frozen)
    directions = random_directions(model)
    first, second = batches(2)
    with ProjectionConstraint(directions, penalty="squared").attach(model, fuse=fuse) as constraint:
        constraint.set_target(*second[1:])
        with torch.inference_mode():
            model(input_ids=first[0])
            model(input_ids=second[0])
            found = constraint.penalty().item()
        with torch.no_grad():
            expected = definition(model, directions, *second) - model(input_ids=second[0]).logits.square().mean()
        assert found == pytest.approx(expected.item(), rel=RELATIVE)
        with pytest.raises(ProConError, match=r"call penalty\(\) under torch.no_grad\(\) too"):
            constraint.penalty()


def test_a_compiled_block_in_a_checkpoint_never_takes_another_target(tiny_model, random_directions):
    """It saves what its graph makes of a target, so it would have to know which one, when it runs again."""
    model = tiny_model(num_hidden_layers=2).train()
    with ProjectionConstraint(random_directions(model), penalty="squared").attach(model) as constraint:
        for block in find_decoder(model).blocks:
            block.compile(backend="eager")
        wrapped(model)
        with pytest.raises(ProConError, match="a compiled block runs again within backward"):
            next_target_first(model, constraint, batches(2))
    torch._dynamo.reset()


def test_a_loop_without_targets_is_stopped_in_a_reentrant_checkpoint_too(tiny_model, random_directions):
    """Its blocks run without gradients first, as those of a reference do, and train within backward."""
    model = tiny_model(num_hidden_layers=2).train()
    with ProjectionConstraint(random_directions(model)).attach(model):
        model.gradient_checkpointing_enable({"use_reentrant": True})
        with pytest.raises(ProConError, match="a training forward ran without anchors"):
            model(input_ids=batches(1)[0][0]).logits.square().mean().backward()


def test_a_target_lives_no_longer_than_its_forward_needs(tiny_model, random_directions):
    """Its anchors are not kept for backward, not even when blocks run again there."""
    model = tiny_model(num_hidden_layers=2).train()
    checkpointing(model)
    with ProjectionConstraint(random_directions(model), penalty="squared").attach(model) as constraint:
        constraint.set_target(*batches(1)[0][1:])
        target = weakref.ref(constraint._state.target)
        loss = model(input_ids=batches(1)[0][0]).logits.square().mean() + constraint.penalty()
        assert target() is not None
        constraint.release()
        assert target() is None
        loss.backward()
