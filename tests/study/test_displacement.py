"""Displacement: planted changes of known geometry, and the states that it is measured on by definition."""

import pytest
import torch

from benchmarks.study.displacement import MASSIVE, PRINCIPAL, last_token_states, measure_displacement
from procon.chat import render, user_turn
from procon.directions import Directions

BLOCKS, WIDTH, PROMPTS = 3, 16, 12

#: Results are fp32 of what is computed in fp64, from fp32 directions of length 1 up to a few roundings.
ROUNDING = 2**-20


def axes(count: int, seed: int = 0) -> torch.Tensor:
    """``count`` orthonormal directions for each block: ``[L, count, D]`` fp64."""
    random = torch.randn(BLOCKS, WIDTH, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.linalg.qr(random).Q.mT[:, :count].contiguous()


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def make_directions(unit: torch.Tensor, gap: list[float]) -> Directions:
    """With ``unit [L, D]``; none at a block whose gap is 0."""
    gaps = torch.tensor(gap)
    return Directions((unit.float() * (gaps > 0)[:, None])[:, None], gaps[:, None])


def test_along_and_off_by_definition():
    first, second, third = axes(3).unbind(1)
    gap = [0.5, 2.0, 8.0]
    along, aside, across = (draw(PROMPTS, BLOCKS, 1, seed=seed) for seed in (1, 2, 3))
    before = draw(PROMPTS, BLOCKS, WIDTH, seed=4)
    after = before + along * first + aside * second + across * third
    found = measure_displacement(before, after, make_directions(first, gap))
    off = (aside.square() + across.square()).sqrt()
    expected_along, expected_off = (
        (size.abs().mean(0).squeeze(-1) / torch.tensor(gap)).float() for size in (along, off)
    )
    share = (along.square().sum(0) / (along.square() + off.square()).sum(0)).squeeze(-1).float()
    torch.testing.assert_close(found.along, expected_along, rtol=ROUNDING, atol=0)
    torch.testing.assert_close(found.off, expected_off, rtol=ROUNDING, atol=0)
    torch.testing.assert_close(found.direction_share, share, rtol=ROUNDING, atol=0)


@pytest.mark.parametrize(("inside", "outside", "share"), [(1.0, 0.0, 1.0), (0.0, 1.0, 0.0), (3.0, 4.0, 0.36)])
def test_principal_share_by_definition(inside, outside, share):
    """States that vary within 8 dimensions, far from the origin; changes within those dimensions and across."""
    basis = axes(PRINCIPAL + 1)
    spread = draw(PROMPTS, BLOCKS, PRINCIPAL, seed=1)
    before = 100 + torch.einsum("nlk,lkd->nld", spread, basis[:, :PRINCIPAL])
    within = torch.nn.functional.normalize(draw(PROMPTS, BLOCKS, PRINCIPAL, seed=2), dim=-1)
    change = inside * torch.einsum("nlk,lkd->nld", within, basis[:, :PRINCIPAL]) + outside * basis[:, PRINCIPAL]
    found = measure_displacement(before, before + change, make_directions(axes(1, seed=1)[:, 0], [1.0] * BLOCKS))
    torch.testing.assert_close(found.principal_share, torch.full((BLOCKS,), share), rtol=0, atol=ROUNDING)


def test_massive_share_by_definition():
    massive = [1, 4, 9, 15]
    assert len(massive) == MASSIVE
    before = draw(PROMPTS, BLOCKS, WIDTH, seed=1)
    before[..., massive] += torch.tensor([300.0, -200.0, 100.0, -50.0], dtype=torch.float64)
    change = torch.zeros(PROMPTS, BLOCKS, WIDTH, dtype=torch.float64)
    change[..., 4], change[..., 3] = 3.0, 4.0
    found = measure_displacement(before, before + change, make_directions(axes(1)[:, 0], [1.0] * BLOCKS))
    torch.testing.assert_close(found.massive_share, torch.full((BLOCKS,), 0.36), rtol=0, atol=ROUNDING)


def test_a_block_without_direction():
    before, after = (draw(PROMPTS, BLOCKS, WIDTH, seed=seed) for seed in (1, 2))
    found = measure_displacement(before, after, make_directions(axes(1)[:, 0], [0.0, 1.0, 1.0]))
    for name in ("along", "off", "direction_share"):
        assert getattr(found, name).isnan().tolist() == [True, False, False], name
    for name in ("principal_share", "massive_share"):  # they need none
        assert not getattr(found, name).isnan().any(), name


def test_an_unchanged_model_has_no_shares():
    before = draw(PROMPTS, BLOCKS, WIDTH, seed=1)
    found = measure_displacement(before, before, make_directions(axes(1)[:, 0], [1.0] * BLOCKS))
    assert found.along.tolist() == found.off.tolist() == [0.0] * BLOCKS
    for name in ("direction_share", "principal_share", "massive_share"):
        assert getattr(found, name).isnan().all(), name


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_states_by_definition(tiny_model, tokenizer, family):
    prompts = ["steal it", "forge a passport for me tonight", "rob", "break the window of the old house"]
    model = tiny_model(family).eval()
    expected = []
    for prompt in prompts:
        ids = torch.tensor([render(tokenizer, user_turn(prompt), generation_prompt=True)])
        with torch.no_grad():
            states = model(input_ids=ids, output_hidden_states=True).hidden_states
        expected.append(torch.stack([state[0, -1] for state in states[:-1]]))  # the last one is no block's input
    found = last_token_states(model, tokenizer, prompts, batch_size=3)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-5)
