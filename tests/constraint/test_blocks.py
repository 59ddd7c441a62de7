"""Which blocks a setting selects, and what it may not say."""

import pytest
import torch

from procon.constraint.blocks import select_blocks
from procon.directions import Directions
from procon.errors import ProConError


def at(usable: list[bool]) -> Directions:
    gaps = torch.tensor(usable).float()[:, None]
    return Directions(torch.eye(len(usable), 8)[:, None] * gaps[..., None], gaps)


#: Block 0 and block 3 have no direction.
DIRECTIONS = at([False, True, True, False, True, True])


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
    assert select_blocks(DIRECTIONS, blocks) == expected


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
        select_blocks(DIRECTIONS, blocks)


@pytest.mark.parametrize(
    ("usable", "blocks"), [([True, False, False], 0.5), ([False, False], "all"), ([False, False], 1.0)]
)
def test_nothing_selected(usable, blocks):
    with pytest.raises(ProConError, match=r"^no block is selected: give at least one block that has a direction"):
        select_blocks(at(usable), blocks)
