"""Which blocks a setting selects, and what it may not say."""

from dataclasses import replace

import pytest
import torch

from procon.constraint.blocks import select_among, select_blocks
from procon.directions import Directions
from procon.errors import ProConError

#: Block 0 and block 3 have no direction.
USABLE = torch.tensor([False, True, True, False, True, True])


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [
        ("all", (1, 2, 4, 5)),
        ([4, 1], (1, 4)),
        ((2, 2, -4), (2,)),
        ([-1, -2, -5], (1, 4, 5)),
        (range(1, 3), (1, 2)),
        (1.0, (1, 2, 4, 5)),
        (0.5, (4, 5)),  # of six blocks, the deepest three
        (0.51, (2, 4, 5)),  # a part of a block is a block
        (1 / 6, (5,)),
        (0.01, (5,)),
    ],
)
def test_selected(blocks, expected):
    assert select_among(USABLE, blocks) == expected
    assert select_among(USABLE, blocks, last=True) == expected  # block inputs: the last output is asked for by name


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [
        ("last", (6,)),
        (["last"], (6,)),
        (("all", "last"), (1, 2, 4, 5, 6)),
        (["last", 0.5], (4, 5, 6)),
        ([4, "last", 1], (1, 4, 6)),
        ([6], (6,)),
        ([-1, 6, "last"], (5, 6)),
    ],
)
def test_the_output_of_the_last_block(blocks, expected):
    assert select_among(USABLE, blocks, last=True) == expected
    with pytest.raises(ProConError, match=r"^blocks names the output of the last block, which has no direction: extr"):
        select_among(USABLE, blocks, last=False)
    with pytest.raises(ProConError, match=r"^blocks names "):
        select_among(USABLE, blocks)


def test_blocks_of_directions_with_and_without_the_last_output():
    gap = torch.tensor([0.0, 1.0, 2.0, 3.0])
    found = Directions((torch.eye(4, 8) * (gap > 0)[:, None])[:, None], gap[:, None], last_output=True)
    assert select_blocks(found, "all") == (1, 2)
    assert select_blocks(found, ["all", "last"]) == (1, 2, 3)
    assert select_blocks(found, "last") == select_blocks(found, [3]) == (3,)
    assert select_blocks(replace(found, last_output=False), "all") == (1, 2, 3)
    with pytest.raises(ProConError, match=r"^blocks names the output of the last block, which has no direction"):
        select_blocks(found.at_block_inputs, "last")
    with pytest.raises(ProConError, match=r"^blocks names block 3, but the model has 3: give indices below 3"):
        select_blocks(found.at_block_inputs, [3])
    with pytest.raises(ProConError, match=r"^blocks names block 4, but the model has 3"):
        select_blocks(found, [4])


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ([6], "blocks names block 6, but the model has 6: give indices below 6"),
        ([1, 9], "blocks names block 9, but the model has 6"),
        ([-7], "blocks names block -1, but the model has 6"),
        ([1, 3], "blocks names block 3, which has no direction: leave it out"),
        ([0], "blocks names block 0, which has no direction: leave it out"),
        ([-6], "blocks names block 0, which has no direction: leave it out"),
    ],
)
def test_blocks_that_are_not_there(blocks, message):
    with pytest.raises(ProConError, match=f"^{message}"):
        select_among(USABLE, blocks)


@pytest.mark.parametrize(
    ("usable", "blocks"), [([True, False, False], 0.5), ([False, False], "all"), ([False, False], 1.0)]
)
def test_nothing_selected(usable, blocks):
    with pytest.raises(ProConError, match=r"^no block is selected: give at least one block that has a direction"):
        select_among(torch.tensor(usable), blocks)
