"""One-sided penalties: a projection that falls below its anchor is penalised, and one that rises above it is not."""

from importlib import import_module

import pytest
import torch
from torch import Tensor

from procon import constrain, projection_penalty, rms_norm_constrain
from procon.errors import ProConError

EPS32 = torch.finfo(torch.float32).eps
PENALTIES = ("squared", "absolute", "huber")
ROUNDING = 0.01

pytestmark = pytest.mark.usefixtures("poisoned_empty")


@pytest.fixture(params=["eager", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


def functions(backend: str):
    """``penalize`` and ``rms_norm_penalize`` of a backend, with the same arguments and results."""
    package = {"eager": "eager", "triton": "kernels"}[backend]
    norm = import_module(f"procon.{package}.rms_norm_penalty").rms_norm_penalize

    def through_norm(hidden: Tensor, *rest):
        return norm(hidden, torch.ones_like(hidden[0]), 1e-6, "llama", 0.0, *rest)[2:]

    return import_module(f"procon.{package}.projection_penalty").penalize, through_norm


def given(device: str, dtype: torch.dtype = torch.float32, rows: int = 40, size: int = 96, k: int = 3) -> list[Tensor]:
    """Departures on both sides, within the rounding and beyond it; hidden states, directions, anchors and weights."""
    make = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, size, generator=make).to(dtype)
    direction = torch.randn(k, size, generator=make)
    lengths = hidden.double().norm(dim=1)[:, None] * direction.double().norm(dim=1)
    off = 3 * ROUNDING * lengths * (2 * torch.rand(rows, k, generator=make) - 1)
    anchor = (hidden.double() @ direction.double().t() + off).float()
    weight = torch.rand(rows, generator=make) * (torch.rand(rows, generator=make) < 0.8)
    return [tensor.to(device) for tensor in (hidden, direction, anchor, weight)]


@pytest.mark.parametrize("rounding", [0.0, ROUNDING])
@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize(("with_anchor", "with_weight"), [(True, True), (True, False), (False, True)])
def test_against_float64(backend, oracle, device, penalty, rounding, with_anchor, with_weight):
    hidden, direction, anchor, weight = given(device)
    anchor, weight = anchor if with_anchor else None, weight if with_weight else None
    if weight is not None:
        hidden[weight == 0] = torch.nan
    expected = oracle(hidden, direction, anchor, weight, penalty, rounding, "fall")
    live = torch.ones(len(hidden), dtype=torch.bool) if weight is None else weight.cpu() != 0
    assert 0.3 < (expected.coefficient[live] < 0).float().mean() < 0.7
    assert not (expected.coefficient > 0).any()

    w = 1 if weight is None else weight.double().cpu()[:, None]
    # Error of e: that of the projection, then one rounding of the difference, which is no larger than its terms.
    off = 6 * EPS32 * expected.scale.nan_to_num()
    # By how much the slope changes with e at most: that of the parabola is steep where the rounding is small.
    reach = rounding * hidden.double().norm(dim=1).nan_to_num()[:, None].cpu() * direction.double().norm(dim=1).cpu()
    steepest = {"squared": 2.0, "absolute": 1 / reach if rounding else 0.0, "huber": 1.0}[penalty]
    steepest = torch.as_tensor(steepest).nan_to_num(posinf=0.0)
    slack = w * steepest * off + 32 * EPS32 * expected.coefficient.abs()
    value_slack = (expected.coefficient.abs() * off + w * steepest * off**2).sum(1) + 32 * EPS32 * (
        expected.token_penalty + (expected.coefficient.abs() * reach).sum(1)
    )
    for run in functions(backend):
        tokens, coefficient = (t.cpu() for t in run(hidden, direction, anchor, weight, penalty, rounding, "fall"))
        assert ((coefficient - expected.coefficient).abs() <= slack).all()
        assert ((tokens - expected.token_penalty).abs() <= value_slack).all()


@pytest.mark.parametrize("rounding", [0.0, ROUNDING])
@pytest.mark.parametrize("penalty", PENALTIES)
def test_both_sides_are_the_two_sides(backend, device, penalty, rounding):
    """Of the mirrored departure, a fall is a rise: fall(d) + fall(-d) = both(d), and the slopes' difference."""
    hidden, direction, anchor, weight = given(device, k=1)
    for run in functions(backend):

        def penalized(sign: int, sides: str, run=run) -> tuple[Tensor, Tensor]:
            return run(hidden, sign * direction, sign * anchor, weight, penalty, rounding, sides)

        (fall, down), (rise, up), (both, slope) = penalized(1, "fall"), penalized(-1, "fall"), penalized(1, "both")
        # Of one direction, one of the two is 0: nothing is rounded.
        assert torch.equal(fall + rise, both)
        assert torch.equal(down - up, slope)
        assert ((fall > 0) != (rise > 0))[weight > 0].all()


def test_each_direction_has_its_own_side(backend, device):
    hidden, direction, anchor, weight = given(device, k=2)
    for run in functions(backend):
        tokens, coefficient = run(hidden, direction, anchor, weight, "huber", 0.0, "fall")
        alone = [run(hidden, direction[[k]], anchor[:, [k]], weight, "huber", 0.0, "fall") for k in range(2)]
        torch.testing.assert_close(tokens, alone[0][0] + alone[1][0])
        torch.testing.assert_close(coefficient, torch.cat([alone[0][1], alone[1][1]], 1))


@pytest.mark.parametrize("penalty", PENALTIES)
def test_bad_states_are_seen_on_either_side(backend, device, penalty):
    """A minimum with 0 would make 0 of infinity, and a run whose states went bad would train on."""
    hidden, direction, anchor, _ = given(device, rows=3, k=1)
    direction = direction.abs()
    for bad in (torch.nan, torch.inf):
        hidden[1] = bad
        for run in functions(backend):
            tokens, coefficient = run(hidden, direction, anchor, None, penalty, ROUNDING, "fall")
            assert tokens.isfinite().tolist() == [True, False, True]
            assert coefficient[:, 0].isfinite().tolist() == [True, False, True]


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("function", ["constrain", "norm", "penalty"])
def test_gradient_is_that_of_the_value(function, penalty, device):
    """Against a central difference, in float64, of each public function."""
    make = torch.Generator().manual_seed(1)
    hidden, along = torch.randn(2, 6, 16, generator=make, dtype=torch.float64)
    direction = torch.randn(2, 16, generator=make, dtype=torch.float64)
    anchor = hidden @ direction.T + torch.randn(6, 2, generator=make, dtype=torch.float64)
    weight = torch.rand(6, generator=make)
    rest = (direction, anchor, weight)

    def loss(x: Tensor) -> Tensor:
        options = {"penalty": penalty, "sides": "fall"}
        if function == "norm":
            return rms_norm_constrain(x, torch.ones(16, dtype=x.dtype), 1e-6, *rest, **options)[1]
        return constrain(x, *rest, **options)[1] if function == "constrain" else projection_penalty(x, *rest, **options)

    x = hidden.clone().requires_grad_()
    loss(x).backward()
    step = 1e-6
    difference = (loss(hidden + step * along) - loss(hidden - step * along)) / (2 * step)
    assert difference.abs() > 1e-2
    torch.testing.assert_close((x.grad * along).sum(), difference, rtol=1e-7, atol=1e-9)
    rises = ((hidden @ direction.T - anchor) > 0).all(1)
    assert rises.any()
    assert not x.grad[rises].any()


@pytest.mark.parametrize("function", [constrain, projection_penalty])
def test_sides_that_there_are_none(function):
    with pytest.raises(ProConError, match="sides is 'rise': choose one of both, fall"):
        function(torch.ones(2, 3), torch.ones(3), sides="rise")


def test_a_compiled_op_has_its_sides():
    hidden, direction, anchor, weight = given("cpu", k=1)

    def run(x: Tensor) -> Tensor:
        return constrain(x, direction, anchor, weight, sides="fall")[1]

    torch.testing.assert_close(torch.compile(run, backend="aot_eager", fullgraph=True)(hidden), run(hidden))


def test_no_byte_more():
    pytest.importorskip("triton", reason="what the kernels load and store is counted")
    from benchmarks.audit.calls import calls
    from benchmarks.audit.traffic import counted

    def moved(sides: str, name: str) -> int:
        with counted() as accesses:
            calls(11, 64, 2, torch.bfloat16, "absolute", sides=sides)[name].run()
        return sum(access.loaded + access.stored for access in accesses)

    for name in ("pass-through forward", "fused forward"):
        assert moved("fall", name) == moved("both", name) > 0
