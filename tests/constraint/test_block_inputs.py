"""What is constrained is what a block is called with, whatever its norm then gets: by definition, or refused."""

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from procon.constraint import ProjectionConstraint
from procon.models import find_decoder

both_ways = pytest.mark.parametrize("fuse", ["auto", "never"])

BATCH = {"input_ids": torch.randint(5, 60, (2, 6), generator=torch.Generator().manual_seed(0))}


class Odd(nn.Module):
    """A block that does something to its input first, but not in a call without position embeddings, as a probe's."""

    def __init__(self, block: nn.Module, before):
        super().__init__()
        self.block = block
        self.before = before

    def forward(self, hidden_states, position_embeddings=None, **kwargs):
        if position_embeddings is None:
            self.block.input_layernorm(hidden_states)
        else:
            hidden_states = self.before(self.block, hidden_states)
        return self.block(hidden_states, position_embeddings=position_embeddings, **kwargs)


def scaled(_block, x):
    return 1.5 * x


def dropped(_block, x):
    return x * (torch.arange(x.shape[-1]) % 7 > 0)


def norm_called_twice(block, x):
    return x + 0.1 * block.input_layernorm(x)


def untouched(_block, x):
    return x


@both_ways
@pytest.mark.parametrize("before", [scaled, dropped, norm_called_twice, untouched])
def test_blocks_that_change_their_input_before_the_norm(tiny_model, assert_penalty, caplog, before, fuse):
    model = tiny_model()
    blocks = find_decoder(model).blocks
    blocks[1] = Odd(blocks[1], before)
    with caplog.at_level("WARNING", "procon"):
        assert_penalty(model, BATCH, fuse=fuse)
    warned = [record.getMessage() for record in caplog.records]
    apart = fuse == "auto" and before in (scaled, dropped)
    line = "the norm of block 1 reads something else than the block's input: it is constrained apart"
    assert warned == [line] * apart


@both_ways
def test_blocks_that_share_a_norm(tiny_model, assert_penalty, fuse):
    model = tiny_model()
    blocks = find_decoder(model).blocks
    blocks[2].input_layernorm = blocks[1].input_layernorm
    assert_penalty(model, BATCH, fuse=fuse)


@both_ways
def test_checkpointed_blocks_that_change_their_input(tiny_model, random_directions, fuse):
    """What runs again within backward saves what it saved before, whether or not its norm did the work."""
    found = []
    for checkpointed in (False, True):
        model = tiny_model().train()
        blocks = find_decoder(model).blocks
        blocks[1] = Odd(blocks[1], scaled)
        if checkpointed:
            for index, block in enumerate(list(blocks)):
                blocks[index] = checkpoint_wrapper(block)
        with ProjectionConstraint(random_directions(model), penalty="squared").attach(model, fuse=fuse) as constraint:
            constraint.set_target(torch.ones(2, 6, 3), torch.ones(2, 6))
            (model(**BATCH).logits.square().mean() + constraint.penalty()).backward()
        found.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(found[0], found[1])


class PostBackwardFunctionModule(torch.autograd.Function):
    """As ZeRO-3 has it, before every module: what it does in backward is no matter of gradients."""

    @staticmethod
    def forward(ctx, tensor):
        return tensor.detach()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class Halved(torch.autograd.Function):
    """The same numbers, and another gradient."""

    @staticmethod
    def forward(ctx, tensor):
        return tensor.detach()

    @staticmethod
    def backward(ctx, gradient):
        return 0.5 * gradient


@pytest.mark.parametrize("function", [PostBackwardFunctionModule, Halved])
def test_what_other_libraries_wrap_around_each_input(tiny_model, assert_penalty, caplog, function):
    """Tensors that are the block's input in all but name go through the norm; those with another gradient do not."""
    model = tiny_model()
    for module in [*find_decoder(model).blocks.modules()][1:]:
        module.register_forward_pre_hook(lambda _module, args: tuple(function.apply(arg) for arg in args))
    with caplog.at_level("WARNING", "procon"):
        assert_penalty(model, BATCH, reference=None if function is Halved else tiny_model().double())
    assert len(caplog.records) == (3 if function is Halved else 0)


def test_a_second_constraint_leaves_the_first_one_in_the_norms(tiny_model, random_directions, caplog):
    model = tiny_model().train()
    directions = random_directions(model)
    with ProjectionConstraint(directions).attach(model) as one, ProjectionConstraint(directions).attach(model) as two:
        assert (one.fused, two.fused) == ((0, 1, 2), ())
        for constraint in (one, two):
            constraint.set_target(torch.zeros(2, 6, 3), torch.ones(2, 6))
        model(**BATCH)
        torch.testing.assert_close(one.penalty(), two.penalty())
        assert not caplog.records
