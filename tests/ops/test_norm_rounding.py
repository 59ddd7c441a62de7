"""The norm's results are rounded once: half a spacing of their dtype from exact, and what float32 sums carry.

In the PyTorch path alone: Triton's interpreter truncates to bfloat16 where a GPU rounds.
"""

import pytest
import torch
from torch import Tensor

from procon.eager.rms_norm_penalty import rms_norm_gradient, rms_norm_penalize

EPS32 = torch.finfo(torch.float32).eps
ROWS, SIZE = 17, 64

pytestmark = pytest.mark.usefixtures("poisoned_empty")


def half_spacing(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Of the numbers of ``dtype`` at ``values`` (float64); at a power of 2 that of the wider side."""
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(values.abs().clamp(min=info.tiny) * (1 + info.eps))
    return torch.ldexp(torch.full_like(values, info.eps / 2), exponent - 1)


def inputs(dtype: torch.dtype, weight_dtype: torch.dtype, k: int = 2) -> dict[str, Tensor]:
    make = torch.Generator().manual_seed(11)
    given = {
        "hidden": (5 * torch.randn(ROWS, SIZE, generator=make)).to(dtype),
        "incoming": torch.randn(ROWS, SIZE, generator=make),
        "norm_weight": (1 + torch.randn(SIZE, generator=make) / 3).to(weight_dtype),
        "coefficient": torch.randn(ROWS, k, generator=make),
        "direction": torch.randn(k, SIZE, generator=make) / 8,
    }
    given["inverse_rms"] = given["hidden"].float().square().mean(1).add(1e-6).rsqrt()
    return given


@pytest.mark.parametrize(("casting", "offset"), [("llama", 0.0), ("gemma", 1.0)])
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_normed_states(dtype, weight_dtype, casting, offset):
    given = inputs(dtype, weight_dtype)
    hidden, norm_weight = given["hidden"], given["norm_weight"]
    normed, s, tokens, coefficient = rms_norm_penalize(
        hidden, norm_weight, 1e-6, casting, offset, None, None, None, "squared"
    )
    torch.testing.assert_close(s, given["inverse_rms"], rtol=8 * EPS32, atol=0)
    n = hidden.float() * s.unsqueeze(1)
    if casting == "llama":
        assert normed.dtype == torch.promote_types(dtype, weight_dtype)
        n = n.to(dtype)
    else:
        assert normed.dtype == dtype
    exact = n.double() * (norm_weight.double() + offset)
    carried = 4 * EPS32 * exact.abs() if casting == "gemma" else 0
    assert ((normed.double() - exact).abs() <= half_spacing(exact, normed.dtype) + carried).all()
    assert tokens.shape == (0,)
    assert coefficient.shape == (ROWS, 0)


@pytest.mark.parametrize("upstream", [None, 0.7])
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize(
    ("dtype", "weight_dtype", "incoming_dtype"),
    [
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16, torch.float16),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.float32, torch.float32, torch.bfloat16),
    ],
)
def test_gradients(dtype, weight_dtype, incoming_dtype, offset, upstream):
    given = inputs(dtype, weight_dtype)
    given["incoming"] = given["incoming"].to(incoming_dtype)
    upstream = None if upstream is None else torch.tensor(upstream)
    names = "hidden", "norm_weight", "inverse_rms", "coefficient", "direction"
    saved = [given[name] for name in names]
    gradient, for_weight = rms_norm_gradient(given["incoming"], upstream, *saved, offset, True)
    assert gradient.dtype == dtype
    assert for_weight.dtype == weight_dtype

    h, v, s, c, r = (tensor.double() for tensor in saved)
    g, s, v = given["incoming"].double(), s.unsqueeze(1), v + offset
    m, n = g * v, s * h
    penalty = 0 * h if upstream is None else float(upstream) * c @ r
    exact = s * (m - n * (m * n).mean(1, keepdim=True)) + penalty
    terms = s * (m.abs() + n.abs() * (m * n).abs().mean(1, keepdim=True))
    terms += 0 if upstream is None else float(upstream) * c.abs() @ r.abs()
    assert ((gradient.double() - exact).abs() <= half_spacing(exact, dtype) + SIZE * EPS32 * terms).all()

    exact, terms = (g * n).sum(0), (g * n).abs().sum(0)
    assert ((for_weight.double() - exact).abs() <= half_spacing(exact, weight_dtype) + ROWS * EPS32 * terms).all()

    _, nothing = rms_norm_gradient(given["incoming"], upstream, *saved, offset, False)
    assert nothing.shape == (0,)
