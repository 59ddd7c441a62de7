"""RMSNorm that carries the penalty: against transformers' own norm and float64, in both backends and every usage.

Tolerance: at most twice the error of the eager computation in the same dtype (transformers' norm, and the penalty
written out), measured against float64, and of the largest result one unit of roundoff where that is in half precision,
or eight in float32, as many as the roundings between input and result.
"""

from importlib import import_module
from itertools import product
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from procon.ops import constrain, rms_norm, rms_norm_constrain

EPS = 1e-5
#: transformers' family and class for each rule.
RULES = {
    ("llama", 0.0): ("llama", "LlamaRMSNorm"),
    ("gemma", 1.0): ("gemma2", "Gemma2RMSNorm"),
    ("gemma", 0.0): ("gpt_oss", "GptOssRMSNorm"),
}
#: Dtypes of the hidden states and of the norm's weight.
DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.float32),
]

pytestmark = pytest.mark.usefixtures("poisoned_empty")


@pytest.fixture(params=["eager", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


def functions(backend: str) -> ModuleType:
    return import_module(f"procon.{ {'eager': 'eager', 'triton': 'kernels'}[backend] }.rms_norm_penalty")


def inputs(rows: int, size: int, k: int, dtypes: tuple[torch.dtype, torch.dtype], device: str) -> dict[str, Tensor]:
    """Hidden states with the odd large channel that language models have, half of the tokens of weight 0."""
    make = torch.Generator().manual_seed(size + k)
    hidden = torch.randn(rows, size, generator=make) * 3
    hidden[:, :: max(1, size // 3)] *= 20
    direction = nn.functional.normalize(torch.randn(k, size, generator=make), dim=-1)
    hidden = hidden.to(dtypes[0])
    values = {
        "hidden": hidden,
        "norm_weight": (1 + 0.3 * torch.randn(size, generator=make)).to(dtypes[1]),
        "direction": direction,
        "anchor": hidden.float() @ direction.T + torch.randn(rows, k, generator=make),
        "weight": torch.rand(rows, generator=make) * (torch.rand(rows, generator=make) < 0.5),
        "incoming": torch.randn(rows, size, generator=make),
    }
    return {name: value.to(device) for name, value in values.items()}


def results(hidden: Tensor, norm_weight: Tensor, run, incoming: Tensor) -> list[Tensor]:
    """Normed states, penalty, and the gradients of hidden states and weight, for an upstream gradient of 0.3."""
    x, v = hidden.detach().clone().requires_grad_(), norm_weight.detach().clone().requires_grad_()
    normed, penalty = run(x, v)
    torch.autograd.backward([normed, penalty], [incoming.to(normed.dtype), torch.full_like(penalty, 0.3)])
    return [normed.detach(), penalty.detach(), x.grad, v.grad]


def by_definition(given: dict[str, Tensor], normed) -> tuple[Tensor, Tensor]:
    """The norm as given, and the squared penalty written out in the dtype of the directions."""

    def run(x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        r, a, w = given["direction"], given["anchor"], given["weight"]
        return normed(x, v), ((x.to(r.dtype) @ r.T - a).square().sum(-1) * w).sum()

    return run


@pytest.mark.parametrize(("size", "k"), [(64, 3), (576, 1), (1000, 2)])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtypes", DTYPES)
def test_outputs_and_gradients(backend, device, dtypes, rule, size, k):
    given = inputs(9, size, k, dtypes, device)
    casting, offset = rule
    family, class_name = RULES[rule]
    theirs = pytest.importorskip(f"transformers.models.{family}.modeling_{family}", reason="it is compared with theirs")
    module = getattr(theirs, class_name)(size, eps=EPS)

    def transformers_norm(x: Tensor, v: Tensor) -> Tensor:
        return torch.func.functional_call(module, {"weight": v}, (x,))

    def exact_norm(x: Tensor, v: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * (v + offset)

    def ours(x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        rest = (given["direction"], given["anchor"], given["weight"])
        return rms_norm_constrain(x, v, EPS, *rest, casting=casting, offset=offset, backend=backend)

    in_float64 = {name: value.double() for name, value in given.items()}
    hidden, norm_weight, incoming = given["hidden"], given["norm_weight"], given["incoming"]
    eager = results(hidden, norm_weight, by_definition(given, transformers_norm), incoming)
    # The gradient that arrives is the one that arrives for the eager norm, rounded to its dtype.
    incoming = incoming.to(eager[0].dtype)
    exact = results(
        in_float64["hidden"], in_float64["norm_weight"], by_definition(in_float64, exact_norm), incoming.double()
    )
    found = results(hidden, norm_weight, ours, incoming)
    # The penalty is compared with that of `constrain` below.
    for name, index in {"normed": 0, "hidden gradient": 2, "weight gradient": 3}.items():
        one, same_dtype, reference = found[index], eager[index], exact[index]
        assert one.dtype == same_dtype.dtype, name
        coarsest = given["hidden"].dtype if casting == "llama" else one.dtype  # of the roundings on the way
        slack = torch.finfo(coarsest).eps * (8 if coarsest == torch.float32 else 1) * reference.abs().max()
        allowed = 2 * (same_dtype.double() - reference).abs().max() + slack
        assert (one.double() - reference).abs().max() <= allowed, name
    if backend == "eager" and found[0].dtype.itemsize == 2:
        # Another order of summation moves a result over a rounding boundary in one of many thousands. Triton's
        # interpreter truncates to bfloat16 where a GPU rounds, so it cannot be asked for this.
        assert (found[0] == eager[0]).float().mean() > 0.99


@pytest.mark.parametrize("penalty", ["squared", "absolute"])
@pytest.mark.parametrize(("with_anchor", "with_weight"), [(True, True), (True, False), (False, True), (False, False)])
def test_penalty_is_the_one_of_constrain(backend, device, penalty, with_anchor, with_weight):
    given = inputs(11, 576, 2, (torch.bfloat16,) * 2, device)
    rest = given["direction"], given["anchor"] if with_anchor else None, given["weight"] if with_weight else None
    gradients, penalties = [], []
    for run in (
        lambda x: rms_norm_constrain(x, given["norm_weight"], EPS, *rest, penalty=penalty, backend=backend)[1],
        lambda x: constrain(x, *rest, penalty=penalty, backend=backend)[1],
    ):
        x = given["hidden"].clone().requires_grad_()
        loss = run(x)
        loss.backward()
        penalties.append(loss.detach())
        gradients.append(x.grad)
    torch.testing.assert_close(*penalties, rtol=1e-5, atol=0)
    torch.testing.assert_close(*gradients)


def test_the_constraint_leaves_the_norm_alone(backend, device):
    given = inputs(13, 576, 1, (torch.bfloat16,) * 2, device)
    hidden, norm_weight, direction, anchor = (given[n] for n in ("hidden", "norm_weight", "direction", "anchor"))
    normed = rms_norm(hidden, norm_weight, EPS, backend=backend)
    constrained, _ = rms_norm_constrain(hidden, norm_weight, EPS, direction, anchor, backend=backend)
    assert torch.equal(normed, constrained)


def test_rows_of_weight_zero_may_hold_anything(backend, device):
    given = inputs(12, 576, 2, (torch.bfloat16,) * 2, device)
    dead = given["weight"] == 0
    assert dead.any()
    assert not dead.all()

    def run(hidden: Tensor) -> list[Tensor]:
        rest = given["direction"], given["anchor"], given["weight"]
        # The weight gets no gradient: it would be NaN as that of any RMSNorm is.
        x = hidden.clone().requires_grad_()
        normed, penalty = rms_norm_constrain(x, given["norm_weight"], EPS, *rest, backend=backend)
        torch.autograd.backward([normed, penalty], [given["incoming"].to(normed.dtype), torch.ones_like(penalty)])
        return [penalty, normed[~dead], x.grad[~dead], normed[dead]]

    clean = run(given["hidden"])
    given["hidden"][dead] = float("nan")
    given["anchor"][dead] = float("inf")
    *live, normed = run(given["hidden"])
    assert all(map(torch.equal, live, clean))
    assert normed.isnan().all()


@pytest.mark.parametrize(
    ("hidden_needs", "weight_needs", "use_normed", "use_penalty"), [*product([True, False], repeat=4)]
)
def test_every_combination(backend, device, hidden_needs, weight_needs, use_normed, use_penalty):
    given = inputs(7, 64, 2, (torch.float32,) * 2, device)
    gradients = []
    for run in (
        lambda x, v: rms_norm_constrain(
            x, v, EPS, given["direction"], given["anchor"], given["weight"], backend=backend
        ),
        by_definition(given, lambda x, v: nn.functional.rms_norm(x, (64,), v, EPS)),
    ):
        x = given["hidden"].clone().requires_grad_(hidden_needs)
        v = given["norm_weight"].clone().requires_grad_(weight_needs)
        normed, penalty = run(x, v)
        loss = torch.zeros((), device=device, requires_grad=True)
        if use_normed:
            assert normed.requires_grad == (hidden_needs or weight_needs)
            loss = loss + (normed * given["incoming"]).sum()
        if use_penalty:
            loss = loss + 0.7 * penalty
        loss.backward()
        gradients.append((x.grad, v.grad))
    for found, expected in zip(*gradients, strict=True):
        if expected is None:
            assert found is None
        else:
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", ["expanded", "permuted", "row-strided"])
def test_tensors_of_any_layout(backend, device, layout):
    given = inputs(6, 64, 1, (torch.float32,) * 2, device)
    make = {
        "expanded": lambda t: t[:1].expand(6, 64),
        "permuted": lambda t: t.T.contiguous().T,
        "row-strided": lambda t: torch.cat([t, t], 1)[:, 64:],
    }[layout]

    def run(strict) -> list[Tensor]:
        x = strict(make(given["hidden"])).detach().requires_grad_()
        v = strict(given["norm_weight"].repeat_interleave(2)[::2]).detach().requires_grad_()
        normed, penalty = rms_norm_constrain(x, v, EPS, given["direction"], given["anchor"], backend=backend)
        (dx, dv) = torch.autograd.grad([normed, penalty], [x, v], [strict(make(given["incoming"])), penalty * 0 + 1])
        return [normed, penalty, dx, dv]

    for found, expected in zip(run(lambda t: t), run(lambda t: t.contiguous()), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_incoming_gradient_is_never_written_to(backend, device):
    given = inputs(6, 64, 1, (torch.float32,) * 2, device)
    x = given["hidden"].clone().requires_grad_()
    normed, penalty = rms_norm_constrain(x, given["norm_weight"], EPS, given["direction"], backend=backend)
    before = given["incoming"].clone()
    torch.autograd.backward([normed, penalty], [given["incoming"], torch.ones_like(penalty)])
    assert torch.equal(given["incoming"], before)


def test_offsets_beyond_32_bits(backend, device):
    # Untouched pages of the 4.3 GB are never taken from the system.
    stride, size = 2**30 + 64, 64
    far = torch.empty(2 * stride + size, dtype=torch.bfloat16, device=device).as_strided((3, size), (stride, 1))
    given = inputs(3, size, 1, (torch.bfloat16,) * 2, device)
    near = given["hidden"]
    far.copy_(near)
    module = functions(backend)
    options = (given["norm_weight"], EPS, "llama", 0.0, given["direction"], given["anchor"], None, "squared")
    normed, inverse_rms, tokens, coefficient = module.rms_norm_penalize(near, *options)
    assert all(map(torch.equal, module.rms_norm_penalize(far, *options), (normed, inverse_rms, tokens, coefficient)))
    upstream = torch.ones((), device=device)
    saved = (given["norm_weight"], inverse_rms, coefficient, given["direction"], 0.0, True)
    expected = module.rms_norm_gradient(near, upstream, near, *saved)
    assert all(map(torch.equal, module.rms_norm_gradient(far, upstream, far, *saved), expected))


@pytest.mark.parametrize("rows", [0, 1, 3, 37])
def test_any_number_of_rows(backend, device, rows):
    """Fewer than programs, more than a round of them, and none."""
    given = inputs(rows, 64, 2, (torch.float32,) * 2, device)

    def ours(x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return rms_norm_constrain(x, v, EPS, given["direction"], given["anchor"], given["weight"], backend=backend)

    found = results(given["hidden"], given["norm_weight"], ours, given["incoming"])
    eager = by_definition(given, lambda x, v: nn.functional.rms_norm(x, (64,), v, EPS))
    expected = results(given["hidden"], given["norm_weight"], eager, given["incoming"])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_too_long_for_registers(backend, device, dtype):
    given = inputs(3, 16384, 1, (dtype, dtype), device)
    rest = given["direction"], given["anchor"], given["weight"]
    found = results(
        given["hidden"],
        given["norm_weight"],
        lambda x, v: rms_norm_constrain(x, v, EPS, *rest, casting="gemma", backend=backend),
        given["incoming"],
    )
    exact = {name: value.double() for name, value in given.items()}
    expected = results(
        exact["hidden"],
        exact["norm_weight"],
        by_definition(exact, lambda x, v: nn.functional.rms_norm(x, (16384,), v, EPS)),
        exact["incoming"].to(dtype).double(),
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other.to(one.dtype), rtol=2 * torch.finfo(dtype).eps * 8, atol=1e-4)


def test_two_runs_are_bitwise_equal(backend, device):
    given = inputs(33, 576, 3, (torch.bfloat16,) * 2, device)

    def ours(x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return rms_norm_constrain(x, v, EPS, given["direction"], given["anchor"], given["weight"], backend=backend)

    one, two = (results(given["hidden"], given["norm_weight"], ours, given["incoming"]) for _ in range(2))
    assert all(map(torch.equal, one, two))


@pytest.mark.parametrize(("casting", "offset"), RULES)
def test_gradcheck(backend, device, casting, offset):
    given = {name: value.double() for name, value in inputs(4, 6, 2, (torch.float32,) * 2, device).items()}
    hidden, norm_weight = given["hidden"].div(9).requires_grad_(), given["norm_weight"].requires_grad_()

    def run(x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        rest = given["direction"], given["anchor"], given["weight"]
        return rms_norm_constrain(x, v, EPS, *rest, casting=casting, offset=offset, penalty="squared", backend=backend)

    def alone(x: Tensor, v: Tensor) -> Tensor:
        return rms_norm(x, v, EPS, casting=casting, offset=offset, backend=backend)

    # Of the kernels a few random sums of all derivatives, as each takes the interpreter long.
    for function in (run, alone):
        assert torch.autograd.gradcheck(function, (hidden, norm_weight), fast_mode=backend == "triton")


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float16])
def test_weight_gradient_of_float64_states_in_half_precision(device, weight_dtype):
    pytest.importorskip("triton", reason="the kernels are written in it")
    given = inputs(5, 64, 1, (torch.float64, weight_dtype), device)
    gradients = []
    for backend in ("eager", "triton"):
        v = given["norm_weight"].clone().requires_grad_()
        rms_norm(given["hidden"], v, EPS, backend=backend).sum().backward()
        gradients.append(v.grad)
    # Triton's interpreter truncates to bfloat16 where a GPU rounds.
    torch.testing.assert_close(*gradients, rtol=torch.finfo(weight_dtype).eps, atol=0)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint(backend, device, use_reentrant):
    given = inputs(5, 64, 1, (torch.float32,) * 2, device)

    def step(x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return rms_norm_constrain(x, v, EPS, given["direction"], given["anchor"], backend=backend)

    def again(x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return checkpoint(step, x, v, use_reentrant=use_reentrant)

    plain, recomputed = (
        results(given["hidden"], given["norm_weight"], run, given["incoming"]) for run in (step, again)
    )
    assert all(map(torch.equal, plain, recomputed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(backend, device, dtype):
    given = inputs(5, 64, 2, (dtype, dtype), device)

    def run(enabled: bool) -> list[Tensor]:
        def step(x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            rest = given["direction"], given["anchor"], given["weight"]
            with torch.autocast(device, dtype=torch.bfloat16, enabled=enabled):
                return rms_norm_constrain(x, v, EPS, *rest, backend=backend)

        return results(given["hidden"], given["norm_weight"], step, given["incoming"])

    assert all(map(torch.equal, run(False), run(True)))


def test_what_stays_alive_until_backward(backend, device):
    """The hidden states themselves, which the residual stream keeps anyway, and a few numbers per token: no copies."""
    tokens, size = 512, 64
    given = inputs(tokens, size, 1, (torch.bfloat16,) * 2, device)
    hidden, norm_weight = given["hidden"].requires_grad_(), given["norm_weight"].requires_grad_()
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        rest = given["direction"], given["anchor"], given["weight"]
        rms_norm_constrain(hidden, norm_weight, EPS, *rest, backend=backend)
    given_by_caller = {t.untyped_storage().data_ptr() for t in (hidden, norm_weight, given["direction"])}
    assert sum(size for pointer, size in saved.items() if pointer not in given_by_caller) <= 8 * tokens
