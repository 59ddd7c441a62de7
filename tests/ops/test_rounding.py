"""The absolute penalty near its anchors, where a departure is rounding: a parabola, not a sign."""

import pytest
import torch

from procon import constrain, rms_norm_constrain

#: Unequal to any rounding that the public functions choose.
ROUNDING = 0.01


def functions(backend):
    if backend == "triton":
        from procon.kernels import projection_penalty, rms_norm_penalty
    else:
        from procon.eager import projection_penalty, rms_norm_penalty
    return projection_penalty.penalize, rms_norm_penalty.rms_norm_penalize


def given(dtype, device, reach=ROUNDING, k=3, rows=40, size=96):
    """Hidden states, directions of unequal lengths, anchors within and beyond the rounding, and weights."""
    make = torch.Generator().manual_seed(0)
    hidden = (5 * torch.randn(rows, size, generator=make)).to(dtype)
    direction = torch.randn(k, size, generator=make)
    lengths = hidden.double().norm(dim=1)[:, None] * direction.double().norm(dim=1)
    off = 3 * reach * lengths * (2 * torch.rand(rows, k, generator=make) - 1)
    anchor = hidden.double() @ direction.double().t() + off
    anchor = anchor if dtype == torch.float64 else anchor.float()
    weight = torch.rand(rows, generator=make) * (torch.rand(rows, generator=make) < 0.8)
    return [tensor.to(device) for tensor in (hidden, direction, anchor, weight)]


@pytest.fixture(params=["eager", "triton"])
def backend(request):
    return request.param


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_it_is_a_parabola_up_to_the_rounding_and_straight_beyond(backend, dtype, norm, weighted, oracle, device):
    hidden, direction, anchor, weight = given(dtype, device)
    if weighted:
        hidden[weight == 0] = torch.nan
    rest = (direction, anchor, weight if weighted else None, "absolute")
    penalize, norm_penalize = functions(backend)
    reach = ROUNDING * direction.norm(dim=1)
    if norm:
        ones = torch.ones(hidden.shape[1], device=device)
        _, _, tokens, coefficient = norm_penalize(hidden, ones, 1e-6, "llama", 0.0, *rest, reach)
    else:
        tokens, coefficient = penalize(hidden, *rest, reach)
    expected = oracle(hidden, *rest, ROUNDING)
    slopes = expected.coefficient.abs() / (weight.cpu()[:, None] if weighted else 1)
    assert 0.2 < (slopes < 0.999).float().mean() < 0.7  # both kinds are there
    torch.testing.assert_close(coefficient.cpu().double(), expected.coefficient, rtol=1e-4, atol=2e-4)
    torch.testing.assert_close(tokens.cpu().double(), expected.token_penalty, rtol=1e-4, atol=1e-5)


def test_nothing_at_all_has_no_slope(backend, device):
    penalize, _ = functions(backend)
    nothing = torch.zeros(3, 8, device=device)
    tokens, coefficient = penalize(nothing, nothing[:1], None, None, "absolute", nothing[0, :1])
    assert not tokens.any()
    assert not coefficient.any()


@pytest.mark.parametrize(
    ("dtype", "autocast", "rounding"),
    [
        (torch.float64, False, 16 * 2**-52),
        (torch.float32, False, 16 * 2**-23),
        (torch.float32, True, 2**-8),
        (torch.float16, False, 2**-8),
        (torch.bfloat16, False, 2**-8),
    ],
)
def test_the_rounding_is_that_of_the_dtype(dtype, autocast, rounding, oracle):
    hidden, direction, anchor, weight = given(dtype, "cpu", reach=rounding)
    expected = oracle(hidden, direction, anchor, weight, "absolute", rounding)
    for run in (
        lambda x: constrain(x, direction, anchor, weight, penalty="absolute")[1],
        lambda x: rms_norm_constrain(
            x, torch.ones(x.shape[1], dtype=dtype), 1e-6, direction, anchor, weight, penalty="absolute"
        )[1],
    ):
        x = hidden.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            run(x).backward()
        # A slope errs by the projection's own error over the rounding, which in these two is of an error's size.
        error = (x.grad.double() - expected.gradient).norm() / expected.gradient.norm()
        assert error < (0.05 if rounding < 1e-6 else 0.01)


@pytest.mark.parametrize("ulps", [0, 6], ids=["another order of summation", "another attention kernel"])
def test_beside_its_anchors_a_model_is_hardly_pushed(ulps):
    """Anchors that are off by rounding: every departure is noise, and a sign would push at full strength.

    Between attention kernels the float32 hidden states of SmolLM2-135M differ by some 6 units in the last place.
    """
    make = torch.Generator().manual_seed(0)
    hidden = torch.randn(4096, 576, generator=make)
    direction = torch.nn.functional.normalize(torch.randn(576, generator=make), dim=0)
    recorded = hidden * (1 + ulps * torch.finfo(torch.float32).eps * torch.randn(hidden.shape, generator=make))
    anchor = recorded.flip(1) @ direction.flip(0)
    assert not torch.equal(anchor, hidden @ direction)
    pushes = []
    for away in (0.0, 1.0):
        x = hidden.clone().requires_grad_()
        constrain(x, direction, anchor + away, penalty="absolute")[1].backward()
        pushes.append(x.grad.norm())
    assert pushes[0] < 0.05 * pushes[1]
