"""Are the gradients right in every usage? Outputs used or not, any upstream gradient, autocast, checkpoints."""

import copy
import weakref
from functools import partial
from itertools import product

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from procon.errors import ProConError
from procon.ops import constrain, project, projection_penalty, rms_norm_constrain

PENALTIES = ("squared", "absolute")

pytestmark = pytest.mark.usefixtures("poisoned_empty")


@pytest.fixture(params=["eager", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def problem(device):
    """Hidden states ``[2, 5, 24]``, three directions, anchors, and weights of which some are 0."""
    make = torch.Generator().manual_seed(7)
    hidden = torch.randn(2, 5, 24, generator=make)
    direction = torch.randn(3, 24, generator=make) / 24**0.5
    anchor = torch.randn(2, 5, 3, generator=make)
    weight = torch.rand(2, 5, generator=make)
    weight[0, 1:3] = 0
    return tuple(t.to(device) for t in (hidden, direction, anchor, weight))


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("k", [1, 3])
def test_gradcheck(problem, backend, penalty, k):
    hidden, direction, anchor, weight = (t.double() for t in problem)
    hidden = hidden[0, :2, :5].requires_grad_()
    direction, anchor, weight = direction[:k, :5], anchor[0, :2, :k], weight[0, :2]

    def both(x):
        return constrain(x, direction, anchor, weight, penalty=penalty, backend=backend)

    def reduced(x):
        options = {"penalty": penalty, "backend": backend}
        return tuple(
            projection_penalty(x, direction, anchor, weight, reduction=r, **options) for r in ("sum", "mean", "none")
        )

    # Of the kernels a few random sums of all derivatives, as each takes the interpreter long.
    check = partial(torch.autograd.gradcheck, inputs=(hidden,), fast_mode=backend == "triton")
    assert check(both)
    assert check(reduced)
    if penalty == "squared":  # of which projections know nothing
        assert check(lambda x: project(x, direction, backend=backend))


@pytest.mark.parametrize(
    ("needs_grad", "use_hidden", "use_penalty"), [*product([True, False], [True, False], [True, False])]
)
def test_every_combination_of_outputs(problem, oracle, backend, needs_grad, use_hidden, use_penalty):
    hidden, direction, anchor, weight = problem
    leaf = hidden.clone().requires_grad_(needs_grad)
    same, penalty = constrain(leaf, direction, anchor, weight, backend=backend)
    assert same.requires_grad == penalty.requires_grad == needs_grad
    assert torch.equal(same, hidden)

    loss = torch.zeros((), device=hidden.device, requires_grad=True)
    arriving = torch.randn_like(hidden)
    expected = torch.zeros_like(hidden).double().cpu()
    if use_hidden:
        loss = loss + (same * arriving).sum()
        expected += arriving.double().cpu()
    if use_penalty:
        loss = loss + 0.7 * penalty
        rows = hidden.reshape(-1, 24), direction, anchor.reshape(-1, 3), weight.reshape(-1)
        expected += 0.7 * oracle(*rows).gradient.view_as(expected)
    loss.backward()
    if needs_grad and (use_hidden or use_penalty):
        torch.testing.assert_close(leaf.grad.double().cpu(), expected, rtol=1e-5, atol=1e-6)
    else:
        assert leaf.grad is None


def test_gradient_is_linear_in_the_upstream_gradient(problem, backend):
    hidden, direction, anchor, weight = problem
    leaf = hidden.clone().requires_grad_()
    _, penalty = constrain(leaf, direction[0], anchor[..., 0], weight, backend=backend)
    (once,) = torch.autograd.grad(penalty, leaf, retain_graph=True)
    (scaled,) = torch.autograd.grad(3.0 * penalty, leaf, retain_graph=True)
    torch.testing.assert_close(scaled, 3 * once, rtol=4 * torch.finfo(torch.float32).eps, atol=0)
    (nothing,) = torch.autograd.grad(0.0 * penalty, leaf)
    assert (nothing == 0).all()


@pytest.mark.parametrize("layout", ["expanded", "permuted", "row-strided"])
def test_upstream_gradients_of_any_layout(problem, backend, layout):
    hidden, direction, anchor, weight = problem
    arriving = {
        "expanded": torch.full((), 0.3, device=hidden.device).expand(2, 5, 24),
        "permuted": torch.randn(24, 5, 2, device=hidden.device).permute(2, 1, 0),
        "row-strided": torch.randn(2, 5, 48, device=hidden.device)[..., 24:],
    }[layout]
    for_tokens = {
        "expanded": torch.full((), -2.0, device=hidden.device).expand(2, 5),
        "permuted": torch.randn(5, 2, device=hidden.device).T,
        "row-strided": torch.randn(2, 10, device=hidden.device)[:, ::2],
    }[layout]
    for_projections = for_tokens.unsqueeze(-1).expand(2, 5, 3)
    gradients = []
    for strict in (lambda t: t, lambda t: t.contiguous()):
        leaf = hidden.clone().requires_grad_()
        same, penalty = constrain(leaf, direction, anchor, weight, backend=backend)
        tokens = projection_penalty(leaf, direction, anchor, weight, reduction="none", backend=backend)
        projection = project(leaf, direction, backend=backend)
        torch.autograd.backward(
            [same, penalty, tokens, projection],
            [strict(arriving), torch.ones_like(penalty), strict(for_tokens), strict(for_projections)],
        )
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-6)


def test_incoming_gradient_is_never_written_to(problem, backend):
    # A residual connection hands one and the same tensor to both of its branches.
    hidden, *rest = problem
    leaf = hidden.clone().requires_grad_()
    same, penalty = constrain(leaf, *rest, backend=backend)
    arriving = torch.randn_like(hidden)
    before = arriving.clone()
    torch.autograd.backward([same, penalty], [arriving, torch.ones_like(penalty)])
    assert torch.equal(arriving, before)


def test_unused_penalty_hands_the_gradient_on_as_it_is(problem, backend):
    hidden, *rest = problem
    leaf = hidden.clone().requires_grad_()
    same, _ = constrain(leaf, *rest, backend=backend)
    arriving = torch.randn_like(hidden)
    (received,) = torch.autograd.grad(same, leaf, arriving)
    assert received.data_ptr() == arriving.data_ptr()


def test_masked_tokens_get_only_the_arriving_gradient(problem, backend):
    hidden, direction, anchor, weight = problem
    dead = weight == 0
    poisoned = hidden.clone()
    poisoned[dead] = float("nan")
    leaf = poisoned.requires_grad_()
    same, penalty = constrain(leaf, direction, anchor, weight, backend=backend)
    arriving = torch.randn_like(hidden)
    torch.autograd.backward([same, penalty], [arriving, torch.ones_like(penalty)])
    assert penalty.isfinite()
    assert torch.equal(leaf.grad[dead], arriving[dead])
    assert not (leaf.grad[~dead] == arriving[~dead]).all(-1).any()


@pytest.mark.parametrize("shape", [(0, 24), (2, 0, 24), (1, 24), (24,)])
def test_empty_and_single_rows(problem, backend, shape):
    direction = problem[1]
    leaf = torch.randn(shape, device=direction.device, requires_grad=True)
    same, penalty = constrain(leaf, direction, backend=backend)
    (same.sum() + penalty + project(leaf, direction, backend=backend).sum()).backward()
    reference = leaf.detach().clone().requires_grad_()
    z = reference @ direction.T
    (reference.sum() + z.square().sum() + z.sum()).backward()
    torch.testing.assert_close(leaf.grad, reference.grad)


def test_double_backward_through_the_hidden_states_alone(problem, backend):
    hidden, *rest = problem
    leaf = hidden.clone().requires_grad_()
    same, _ = constrain(leaf, *rest, backend=backend)
    (gradient,) = torch.autograd.grad(same.pow(3).sum(), leaf, create_graph=True)
    gradient.sum().backward()
    torch.testing.assert_close(leaf.grad, 6 * hidden)


@pytest.mark.parametrize("function", ["constrain", "rms_norm_constrain", "projection_penalty", "project"])
def test_a_second_derivative_is_refused(problem, backend, function):
    """A plain gradient would pass for one of 0."""
    hidden, direction, *_ = problem
    leaf, weight = hidden.clone().requires_grad_(), torch.ones(24, device=hidden.device)
    found = {
        "constrain": lambda: constrain(leaf, direction, backend=backend)[1],
        "rms_norm_constrain": lambda: rms_norm_constrain(leaf, weight, 1e-6, direction, backend=backend)[1],
        "projection_penalty": lambda: projection_penalty(leaf, direction, backend=backend),
        "project": lambda: project(leaf, direction, backend=backend).square().sum(),
    }[function]()
    with pytest.raises(ProConError, match="no second derivative"):
        torch.autograd.grad(found, leaf, create_graph=True)


@pytest.mark.parametrize("function", ["constrain", "rms_norm_constrain", "project"])
@pytest.mark.parametrize("k", [1, 3])
def test_directions_changed_in_place_before_the_backward_are_refused(problem, backend, function, k):
    hidden, direction, *_ = problem
    leaf, direction = hidden.clone().requires_grad_(), direction[:k] if k > 1 else direction[0]
    penalty = {
        "constrain": lambda: constrain(leaf, direction, backend=backend)[1],
        "rms_norm_constrain": lambda: rms_norm_constrain(leaf, torch.ones_like(leaf[0, 0]), 0, direction)[1],
        "project": lambda: project(leaf, direction, backend=backend).sum(),
    }[function]()
    direction.zero_()
    with pytest.raises((ProConError, RuntimeError), match=r"in ?place"):
        penalty.backward()


def test_changing_the_returned_hidden_states_in_place_is_refused(problem, backend):
    hidden, *rest = problem
    same, _ = constrain(hidden.clone().requires_grad_() * 1, *rest, backend=backend)
    with pytest.raises(RuntimeError, match="inplace"):
        same.add_(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(problem, backend, device, dtype):
    results = []
    for enabled in (False, True):
        leaf = problem[0].to(dtype).requires_grad_()
        with torch.autocast(device, dtype=torch.bfloat16, enabled=enabled):
            same, penalty = constrain(leaf, *problem[1:], backend=backend)
            projection = project(leaf, problem[1], backend=backend)
            mean = projection_penalty(leaf, *problem[1:], reduction="mean", backend=backend)
            torch.autograd.backward(
                [same, penalty, projection, mean], [torch.ones_like(t) for t in (same, penalty, projection, mean)]
            )
        results.append((penalty, projection, mean, leaf.grad))
    for plain, under_autocast in zip(*results, strict=True):
        assert plain.dtype == under_autocast.dtype
        assert torch.equal(plain, under_autocast)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint(problem, backend, use_reentrant):
    hidden, *rest = problem
    block = torch.nn.Linear(24, 24, device=hidden.device)
    twin = copy.deepcopy(block)

    def step(layer, x):
        x, penalty = constrain(x, *rest, backend=backend)
        return x + layer(x).tanh(), penalty

    plain = hidden.clone().requires_grad_()
    out, penalty = step(block, plain)
    (out.square().sum() + penalty).backward()
    again = hidden.clone().requires_grad_()
    out, penalty = checkpoint(step, twin, again, use_reentrant=use_reentrant)
    (out.square().sum() + penalty).backward()
    assert torch.equal(again.grad, plain.grad)
    assert torch.equal(twin.weight.grad, block.weight.grad)


def test_what_stays_alive_until_backward(backend, device):
    tokens, size = 512, 64
    hidden = torch.randn(tokens, size, device=device, dtype=torch.bfloat16, requires_grad=True)
    direction, anchor, weight = torch.randn(size, device=device), *torch.rand(2, tokens, device=device)
    saved: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        constrain(hidden, direction, anchor, weight, backend=backend)
    assert hidden.untyped_storage().data_ptr() not in saved
    given = 4 * tokens + 4 * tokens  # anchor and weight, which the caller keeps
    assert sum(saved.values()) - direction.untyped_storage().nbytes() + given <= 16 * tokens


def test_hidden_states_are_let_go(backend, device):
    leaf = torch.randn(6, 64, device=device, requires_grad=True)
    hidden = leaf * 2
    alive = weakref.ref(hidden)
    penalty = projection_penalty(hidden, torch.randn(64, device=device), backend=backend)
    del hidden
    assert alive() is None
    penalty.backward()
