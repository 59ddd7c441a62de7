"""Do both backends compute the op? Numbers against the fp64 oracle, with tolerances derived from the rounding."""

from importlib import import_module
from itertools import product
from types import ModuleType

import pytest
import torch
from torch import Tensor

EPS32 = torch.finfo(torch.float32).eps
PENALTIES = ("squared", "absolute")
HALF_AND_SINGLE = (torch.float32, torch.bfloat16, torch.float16)

pytestmark = pytest.mark.usefixtures("poisoned_empty")


@pytest.fixture(params=["eager", "kernels"])
def backend(request: pytest.FixtureRequest) -> ModuleType:
    return import_module(f"procon.{request.param}.projection_penalty")


def inputs(rows: int, size: int, k: int, dtype: torch.dtype, device: str, seed: int = 0) -> tuple[Tensor, ...]:
    """Hidden states with the odd large channel that language models have, unit directions, anchors, half the tokens."""
    make = torch.Generator().manual_seed(seed + 1000 * size + k)
    hidden = torch.randn(rows, size, generator=make)
    hidden[:, :: max(1, size // 3)] *= 30
    direction = torch.nn.functional.normalize(torch.randn(k, size, generator=make), dim=-1)
    anchor = hidden @ direction.T + torch.randn(rows, k, generator=make)
    weight = torch.rand(rows, generator=make) * (torch.rand(rows, generator=make) < 0.5)
    return tuple(t.to(device) for t in (hidden.to(dtype), direction, anchor, weight))


def spacing(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Distance between neighbouring numbers of ``dtype`` at ``values`` (float64)."""
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(values.abs().clamp(min=info.tiny))
    return torch.ldexp(torch.full_like(values, info.eps), exponent - 1)


@pytest.mark.parametrize(("size", "k"), [(64, 3), (576, 1), (1000, 8), (2048, 1)])
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
def test_projection(backend, oracle, device, dtype, size, k):
    hidden, direction, _, _ = inputs(5, size, k, dtype, device)
    result = backend.project(hidden, direction)
    expected = oracle(hidden, direction, None, None)
    assert result.dtype == torch.float32
    assert ((result.cpu() - expected.projection).abs() <= 4 * EPS32 * expected.scale).all()


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize(("size", "k"), [(576, 1), (1000, 8)])
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
@pytest.mark.parametrize(("with_anchor", "with_weight"), [(True, True), (True, False), (False, True), (False, False)])
def test_penalty_and_coefficient(backend, oracle, device, dtype, size, k, penalty, with_anchor, with_weight):
    hidden, direction, anchor, weight = inputs(7, size, k, dtype, device)
    anchor, weight = anchor if with_anchor else None, weight if with_weight else None
    tokens, coefficient = (t.cpu() for t in backend.penalize(hidden, direction, anchor, weight, penalty))
    expected = oracle(hidden, direction, anchor, weight, penalty)

    w = torch.ones(7, 1).double() if weight is None else weight.double().cpu().unsqueeze(1)
    z = expected.projection
    # Error of e: that of the projection, then one rounding of the difference.
    off = 4 * EPS32 * expected.scale + EPS32 * (z.abs() if anchor is None else (z - anchor.cpu()).abs())
    steepest = {"squared": 2, "absolute": 0}[penalty]
    slack = w * steepest * off + 2 * EPS32 * expected.coefficient.abs()
    assert ((coefficient - expected.coefficient).abs() <= slack).all()
    slack = (expected.coefficient.abs() * off + w * off**2).sum(1) + 16 * EPS32 * expected.token_penalty
    assert ((tokens - expected.token_penalty).abs() <= slack).all()


@pytest.mark.parametrize("incoming_kind", ["none", "dense", "row-strided"])
@pytest.mark.parametrize("upstream_kind", ["none", "scalar", "per token", "expanded"])
@pytest.mark.parametrize(("dtype", "size", "k"), [*product(HALF_AND_SINGLE, (576,), (1, 3)), (torch.bfloat16, 1000, 8)])
def test_gradient_is_one_rounding_from_exact(backend, device, dtype, size, k, upstream_kind, incoming_kind):
    make = torch.Generator().manual_seed(size + k)
    coefficient = torch.randn(9, k, generator=make).to(device)
    direction = torch.randn(k, size, generator=make).to(device)
    upstream = {
        "none": None,
        "scalar": torch.tensor(0.37, device=device),
        "per token": torch.randn(9, generator=make).to(device),
        "expanded": torch.tensor([-1.7], device=device).expand(9),
    }[upstream_kind]
    wide = torch.randn(9, 2 * size, generator=make).to(dtype).to(device)
    incoming = {"none": None, "dense": wide[:, :size].contiguous(), "row-strided": wide[:, size:]}[incoming_kind]
    before = wide.clone()

    result = backend.accumulate_gradient(incoming, upstream, coefficient, direction, dtype)

    assert result.dtype == dtype
    assert torch.equal(wide, before)
    factor = 1 if upstream is None else upstream.double().reshape(-1, 1)
    terms = (factor * coefficient.double()).unsqueeze(2) * direction.double()
    base = 0 if incoming is None else incoming.double()
    exact = base + terms.sum(1)
    # Where terms cancel, the float32 sum is as exact as its terms and not as its result.
    carried = (k + 1) * EPS32 * (abs(base) + terms.abs().sum(1))
    assert ((result.double() - exact.to(dtype).double()).abs() <= spacing(exact, dtype) + carried).all()


def test_rows_of_weight_zero_may_hold_anything(backend, device):
    hidden, direction, anchor, weight = inputs(12, 576, 2, torch.bfloat16, device)
    clean = backend.penalize(hidden, direction, anchor, weight, "squared")
    dead = weight == 0
    assert dead.any()
    assert not dead.all()
    for garbage in (float("nan"), float("inf"), -float("inf")):
        hidden[dead], anchor[dead] = garbage, garbage
        for result, reference in zip(
            backend.penalize(hidden, direction, anchor, weight, "squared"), clean, strict=True
        ):
            assert torch.equal(result, reference)
            assert (result[dead] == 0).all()


@pytest.mark.parametrize("rounding", [0.0, 1e-7])
@pytest.mark.parametrize("penalty", PENALTIES)
def test_nan_in_a_live_row_is_seen(backend, device, penalty, rounding):
    """In the penalty and in its gradient, where a loss scaler looks for it."""
    hidden, direction, anchor, weight = inputs(12, 64, 2, torch.float32, device)
    weight[3] = 0.5
    hidden[3] = float("nan")
    tokens, coefficient = backend.penalize(hidden, direction, anchor, weight, penalty, rounding * direction.norm(dim=1))
    assert tokens[3].isnan()
    assert coefficient[3].isnan().all()
    assert tokens.isnan().sum() == 1
    assert coefficient.isnan().sum() == 2


@pytest.mark.parametrize("rows", [0, 1, 17])
def test_all_rows_masked_gives_zeros(backend, device, rows):
    hidden, direction, anchor, weight = inputs(rows, 64, 2, torch.float32, device)
    tokens, coefficient = backend.penalize(hidden * float("nan"), direction, anchor, weight * 0, "absolute")
    assert tokens.shape == (rows,)
    assert coefficient.shape == (rows, 2)
    assert (tokens == 0).all()
    assert (coefficient == 0).all()
    assert backend.project(hidden, direction).shape == (rows, 2)
    assert backend.accumulate_gradient(None, None, coefficient, direction, torch.float32).shape == (rows, 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_inputs(backend, device, dtype):
    wide, direction, anchors, weights = inputs(6, 1152, 4, dtype, device)
    direction = direction[:2, :576].contiguous()
    # Such as the anchors of one block out of those of all blocks.
    views = wide[::2, 576:], direction, anchors[::2, ::2], weights[::2]
    strided = backend.penalize(*views, "squared")
    dense = backend.penalize(*(view.contiguous() for view in views), "squared")
    assert all(map(torch.equal, strided, dense))


def test_offsets_beyond_32_bits(backend, device):
    # Untouched pages of the 4.3 GB are never taken from the system.
    stride, size = 2**30 + 64, 64
    far = torch.empty(2 * stride + size, dtype=torch.bfloat16, device=device).as_strided((3, size), (stride, 1))
    near, direction, anchor, _ = inputs(3, size, 1, torch.bfloat16, device)
    far.copy_(near)
    assert torch.equal(backend.project(far, direction), backend.project(near, direction))
    arguments = (None, anchor, direction, torch.bfloat16)
    assert torch.equal(backend.accumulate_gradient(far, *arguments), backend.accumulate_gradient(near, *arguments))


def test_two_runs_are_bitwise_equal(backend, device):
    hidden, direction, anchor, weight = inputs(33, 576, 3, torch.bfloat16, device)

    def run() -> list[Tensor]:
        tokens, coefficient = backend.penalize(hidden, direction, anchor, weight, "squared")
        gradient = backend.accumulate_gradient(hidden, tokens, coefficient, direction, torch.bfloat16)
        return [tokens, tokens.sum(), coefficient, gradient]

    assert all(map(torch.equal, run(), run()))


@pytest.mark.slow
def test_more_rows_than_one_tile(backend, oracle, device):
    # More float32 bytes than a tile of the PyTorch path, more rows than a program of the kernels.
    hidden, direction, _, _ = inputs(601, 576, 1, torch.bfloat16, device)
    projection = backend.project(hidden, direction)
    expected = oracle(hidden, direction, None, None)
    assert ((projection.cpu() - expected.projection).abs() <= 4 * EPS32 * expected.scale).all()
    gradient = backend.accumulate_gradient(hidden, None, projection, direction, torch.bfloat16).double()
    exact = hidden.double() + projection.double() @ direction.double()
    carried = 4 * EPS32 * (hidden.double().abs() + projection.double().abs() @ direction.double().abs())
    assert ((gradient - exact).abs() <= spacing(exact, torch.bfloat16) + carried).all()


def test_absolute_has_slope_zero_at_zero(backend, device):
    hidden, direction, _, _ = inputs(4, 64, 1, torch.float32, device)
    tokens, coefficient = backend.penalize(hidden, direction, backend.project(hidden, direction), None, "absolute")
    assert (tokens == 0).all()
    assert (coefficient == 0).all()
