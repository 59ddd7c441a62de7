"""Drift: nothing for an unchanged model, and the sign and the size of changes that are planted."""

import math

import pytest
import torch

from procon.chat import ContrastPrompts
from procon.directions import ContrastMeans, Directions
from procon.evaluation import measure_drift

PROMPTS = ContrastPrompts(
    malicious=("steal it", "forge a passport for me tonight", "rob", "break the window of the old house"),
    benign=("paint it", "wash the car for me", "sing about the window of the old house tonight"),
)

#: Cosines and shifts come as fp32 from fp64 means of an fp64 model: a few roundings of numbers near 1.
ROUNDING = 2**-20


@pytest.fixture
def model(tiny_model):
    # Blocks' outputs have biases here, and no positions enter the residual stream.
    return tiny_model("gpt_neox").double().eval()


@pytest.fixture
def reference(model, tokenizer):
    return Directions.from_means(ContrastMeans.measure(model, tokenizer, PROMPTS, progress=False))


@pytest.fixture
def drift(model, tokenizer, reference):
    return lambda prompts=PROMPTS: measure_drift(model, tokenizer, reference, prompts, progress=False)


def assert_blocks(found: torch.Tensor, expected: list[float], tolerance: float = ROUNDING) -> None:
    assert math.isnan(found[0])  # no direction there
    torch.testing.assert_close(found[1:], torch.tensor(expected, dtype=torch.float32), rtol=0, atol=tolerance)


def test_an_unchanged_model_has_not_drifted(drift):
    found = drift()
    assert_blocks(found.cosine, [1, 1])
    assert_blocks(found.malicious_shift, [0, 0])
    assert_blocks(found.benign_shift, [0, 0])
    assert found.mean_cosine == pytest.approx(1, abs=ROUNDING)


@pytest.mark.parametrize("amount", [-0.5, 2.0])
def test_a_shift_of_all_prompts_along_the_direction(model, reference, drift, amount):
    """A bias on the output of a block moves both sides alike: the shift sees it, the cosine does not."""
    with torch.no_grad():
        model.gpt_neox.layers[1].mlp.dense_4h_to_h.bias += amount * reference.gaps[2, 0] * reference.basis[2, 0]
    found = drift()
    assert_blocks(found.cosine, [1, 1])
    assert_blocks(found.malicious_shift, [0, amount])
    assert_blocks(found.benign_shift, [0, amount])


def test_a_shift_across_the_direction_is_none(model, reference, drift):
    across = torch.randn(32, generator=torch.Generator().manual_seed(0))
    across -= (across @ reference.basis[2, 0]) * reference.basis[2, 0]
    with torch.no_grad():
        model.gpt_neox.layers[1].mlp.dense_4h_to_h.bias += 10 * reference.gaps[2, 0] * across
    found = drift()
    assert_blocks(found.cosine, [1, 1])
    # The bias is as long as 60 gaps, and across only up to fp32.
    assert_blocks(found.malicious_shift, [0, 0], tolerance=60 * ROUNDING)


def rotate(model, block: int, rotation: torch.Tensor) -> None:
    """Turn what enters ``block``, in a hook of this test: ``h -> h @ rotation.T``."""
    turned = rotation.T.double()
    model.gpt_neox.layers[block - 1].register_forward_hook(lambda _module, _args, output: output @ turned)


@pytest.mark.parametrize("degrees", [30, 90, 150])
def test_a_rotation_of_the_stream_is_its_cosine(model, reference, drift, tokenizer, degrees):
    """The difference of the means turns in the plane of the direction and one at right angles to it."""
    before = ContrastMeans.measure(model, tokenizer, PROMPTS, progress=False)
    r = reference.basis[2, 0].double()
    across = torch.randn(32, generator=torch.Generator().manual_seed(0)).double()
    across -= (across @ r) * r / (r @ r)
    across /= across.norm()
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    rotation = (
        torch.eye(32).double()
        + (cosine - 1) * (torch.outer(r, r) + torch.outer(across, across))
        + sine * (torch.outer(across, r) - torch.outer(r, across))
    )
    rotate(model, 2, rotation)
    found = drift()
    assert_blocks(found.cosine, [1, cosine])
    assert found.mean_cosine == pytest.approx((1 + cosine) / 2, abs=ROUNDING)
    for shift, mean in ((found.malicious_shift, before.malicious[2]), (found.benign_shift, before.benign[2])):
        expected = (rotation @ mean - mean) @ r / reference.gaps[2, 0].double()
        # Projections are kept as fp32, and count in gaps here.
        allowed = ROUNDING * max(1, float(mean.norm() / reference.gaps[2, 0]))
        assert_blocks(shift, [0, float(expected)], tolerance=allowed)


def test_malicious_prompts_that_went_over_to_the_benign_side(model, reference, drift):
    """What the malicious side loses is given in gaps: -1 where it lies where the benign one lay."""
    swapped = drift(ContrastPrompts(PROMPTS.benign, PROMPTS.malicious))
    assert_blocks(swapped.cosine, [-1, -1])
    assert_blocks(swapped.malicious_shift, [-1, -1])
    assert_blocks(swapped.benign_shift, [1, 1])
