"""The study's controls: random directions, random ones within the hidden states, and those of other blocks."""

import pytest
import torch

from benchmarks.study.controls import randomized_within, shuffled
from procon.directions import Directions, randomized
from procon.errors import ProConError


def test_shuffled_directions_are_a_derangement_of_the_usable_ones(tmp_path):
    gap = torch.tensor([0.0, 1.0, 2.0, 0.0, 3.0, 4.0])
    found = Directions((torch.eye(6, 16) * (gap > 0)[:, None])[:, None], *(gap[:, None] + n for n in range(4)))
    orders = set()
    for seed in range(100):
        made = shuffled(found, seed)
        order = made.provenance["source_blocks"]
        assert [order[block] for block in (0, 3)] == [0, 3]
        assert sorted(order) == list(range(6))
        assert all(order[block] != block for block in (1, 2, 4, 5))
        assert torch.equal(made.basis[:, 0], torch.stack([found.basis[block, 0] for block in order]))
        for name in ("gaps", "auroc", "positive", "negative"):
            assert torch.equal(getattr(made, name), getattr(found, name))
        assert made.provenance["shuffled_seed"] == seed
        assert made.hash == shuffled(found, seed).hash != found.hash
        orders.add(tuple(order))
    assert len(orders) == 9  # all that there are of four
    assert Directions.load(made.save(tmp_path / "d.safetensors")).provenance == made.provenance


def test_random_directions_within_the_states_have_their_covariance():
    """In a plane with standard deviations a and b, a normal draw's squared cosine to the first axis is a / (a + b)."""
    gap = torch.tensor([0.0, 1.0, 1.0])
    found = Directions(torch.eye(3, 16)[:, None], gap[:, None])
    plane = torch.randn(50, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plane = torch.linalg.qr(plane - plane.mean(0)).Q * torch.tensor([3.0, 1.0])  # exactly so in the sample, too
    states = torch.full((50, 3, 16), 100.0, dtype=torch.float64)  # a mean far away, which is not to be drawn
    states[..., 4] += plane[:, :1]
    states[..., 9] += plane[:, 1:]
    states[:, 2, 12] = states[:, 2, 4]  # at the last block, the first axis is another one, twice as long
    draws = [randomized_within(found, states, seed) for seed in range(500)]
    drawn = torch.stack([made.basis[:, 0] for made in draws])
    assert drawn[:, 0].count_nonzero() == 0
    torch.testing.assert_close(drawn[:, 1:].norm(dim=-1), torch.ones(500, 2), rtol=0, atol=2**-22)
    others = [axis for axis in range(16) if axis not in (4, 9, 12)]
    assert drawn[:, :, others].abs().max() < 1e-6
    assert drawn[:, 1, 12].abs().max() < 1e-6
    # The square of a cosine lies in [0, 1], so its standard deviation is at most 1/2.
    assert drawn[:, 1, 4].square().mean().item() == pytest.approx(3 / 4, abs=4 * 0.5 / 500**0.5)
    # One combination of the same states at all blocks: coordinates keep their proportions.
    torch.testing.assert_close(drawn[:, 2, 4] * drawn[:, 1, 9], drawn[:, 2, 9] * drawn[:, 1, 4], rtol=0, atol=1e-6)
    assert torch.equal(draws[0].gaps[:, 0], gap)
    assert draws[7].provenance == {"random_within_seed": 7}
    assert randomized_within(found, states, 7).hash == draws[7].hash


@pytest.mark.parametrize(
    ("states", "message"),
    [
        (torch.randn(5, 2, 16), r"hidden_states have shape \(5, 2, 16\): give \[n, 3, 16\] with n above 1"),
        (torch.randn(1, 3, 16).expand(5, 3, 16), "hidden_states of block 1 do not vary"),
        (torch.randn(5, 3, 16).index_fill(1, torch.tensor(2), torch.nan), "block 2 do not vary, or are not finite"),
    ],
)
def test_states_to_draw_from(states, message):
    gap = torch.tensor([0.0, 1.0, 1.0])
    with pytest.raises(ProConError, match=message):
        randomized_within(Directions(torch.eye(3, 16)[:, None], gap[:, None]), states, seed=0)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("control", ["randomized", "within", "shuffled"])
def test_controls_have_as_many_directions(control, k):
    make = torch.Generator().manual_seed(2)
    gaps = torch.tensor([0.0, 1.0, 2.0, 3.0])[:, None].expand(4, k)
    basis = torch.linalg.qr(torch.randn(4, 32, k, generator=make)).Q.mT * (gaps > 0)[..., None]
    found = Directions(basis, gaps)
    if control == "within":
        made = randomized_within(found, torch.randn(20, 4, 32, generator=make), 5)
    else:
        made = (randomized if control == "randomized" else shuffled)(found, 5)
    assert torch.equal(made.gaps, gaps)
    assert made.basis[0].count_nonzero() == 0
    product = made.basis[1:].double() @ made.basis[1:].double().mT
    torch.testing.assert_close(product, torch.eye(k).double().expand_as(product), rtol=0, atol=2**-20)
    if control == "shuffled":
        for block, source in enumerate(made.provenance["source_blocks"]):
            assert torch.equal(made.basis[block], found.basis[source])
    else:
        cosines = made.basis[1:] @ found.basis[1:].mT
        assert cosines.square().sum((1, 2)).max() / k < 0.5
