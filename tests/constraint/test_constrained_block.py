"""What is constrained is what a block is called with, whatever its norm then gets: by definition, or refused."""

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from procon.constraint import ProjectionConstraint
from procon.errors import ProConError
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


def edited(_block, x):
    return x.mul_(1.5)


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


def test_a_block_that_edits_its_input(tiny_model, random_directions, assert_penalty):
    model = tiny_model()
    blocks = find_decoder(model).blocks
    blocks[1] = Odd(blocks[1], edited)
    with ProjectionConstraint(random_directions(model)).attach(model) as constraint:
        assert constraint.fused == (0, 1, 2)
        constraint.set_target(torch.zeros(2, 6, 3), torch.ones(2, 6))
        with pytest.raises(ProConError, match="block 1 changes its input in place before its norm reads it"):
            model(**BATCH)


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
