"""Does torch.compile keep the op in one graph with the same numbers, and do the registered operators tell the truth?"""

from functools import partial

import pytest
import torch

from procon.ops import constrain, project, projection_penalty, rms_norm, rms_norm_constrain


@pytest.fixture(params=["eager", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()


@pytest.fixture
def rest(device):
    make = torch.Generator().manual_seed(3)
    direction = torch.randn(2, 32, generator=make)
    anchor, weight = torch.randn(2, 5, 2, generator=make), torch.rand(2, 5, generator=make)
    return direction.to(device), anchor.to(device), weight.to(device)


def every_usage(hidden, direction, anchor, weight, backend):
    """Every function inside a small computation, with both and with either output of constrain."""
    hidden = hidden * 1.5
    norm_weight = torch.linspace(0.5, 1.5, hidden.shape[-1], dtype=hidden.dtype, device=hidden.device)
    hidden, normed = rms_norm_constrain(hidden, norm_weight, 1e-6, direction, anchor, weight, backend=backend)
    hidden, first = constrain(hidden, direction, anchor, weight, backend=backend)
    passed, _ = constrain(hidden.tanh(), direction, anchor, weight, penalty="absolute", backend=backend)
    _, alone = constrain(hidden, direction[0], None, weight, penalty="absolute", backend=backend)
    mean = projection_penalty(passed, direction, anchor, weight > 0.5, reduction="mean", backend=backend)
    tokens = projection_penalty(passed, direction[1], reduction="none", backend=backend)
    apart = project(hidden, direction, backend=backend).sin().sum()
    along_one = (
        project(hidden, direction[:1], backend=backend) * project(hidden, direction[1], backend=backend)[..., None]
    )
    return passed.sum() + normed + first + alone + mean + (tokens * weight).sum() + apart + along_one.sum()


def loss_and_gradient(function, hidden, *arguments):
    leaf = hidden.clone().requires_grad_()
    loss = function(leaf, *arguments)
    loss.backward()
    return loss.detach(), leaf.grad


@pytest.mark.parametrize(("dtype", "compiler"), [(torch.float32, "eager"), (torch.bfloat16, "aot_eager")])
def test_fullgraph(device, rest, backend, compiler, dtype):
    compiled = torch.compile(every_usage, fullgraph=True, backend=compiler)
    hidden = torch.randn(2, 5, 32, device=device).to(dtype)
    expected = loss_and_gradient(every_usage, hidden, *rest, backend)
    received = loss_and_gradient(compiled, hidden, *rest, backend)
    torch.testing.assert_close(received, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_rms_norm_alone(device, backend, compiler):
    """The gradient of the penalty that it does not give is zeros to a compiler, and None to eager code."""
    norm_weight = torch.linspace(0.5, 1.5, 32, device=device, requires_grad=True)

    def squares(hidden):
        return rms_norm(hidden, norm_weight, 1e-6, backend=backend).square().sum()

    found = []
    for function in (squares, torch.compile(squares, fullgraph=True, backend=compiler)):
        norm_weight.grad = None
        hidden = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0)).to(device)
        found.append((*loss_and_gradient(function, hidden), norm_weight.grad))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_inductor(device, rest, backend):
    def block(hidden):
        hidden, penalty = constrain(hidden * 1.5, *rest, backend=backend)
        return hidden.sin().sum() + penalty

    hidden = torch.randn(2, 5, 32, device=device)
    received = loss_and_gradient(torch.compile(block, fullgraph=True), hidden)
    torch.testing.assert_close(received, loss_and_gradient(block, hidden), rtol=1e-5, atol=1e-5)


def test_dynamic_shapes_compile_once(device, rest, backend):
    direction = rest[0]
    compilations = 0

    def counting(graph, inputs):
        nonlocal compilations
        compilations += 1
        return graph

    def loss(hidden):
        hidden, penalty = constrain(hidden, direction, backend=backend)
        return hidden.sum() + penalty

    compiled = torch.compile(loss, fullgraph=True, backend=counting, dynamic=True)
    for length in (3, 7, 11):
        hidden = torch.randn(2, length, 32, device=device)
        torch.testing.assert_close(loss_and_gradient(compiled, hidden), loss_and_gradient(loss, hidden))
    assert compilations == 1


def test_errors_reach_the_user_of_a_compiled_function(rest):
    compiled = torch.compile(lambda hidden: constrain(hidden, rest[0]), backend="eager")
    with pytest.raises(Exception, match=r"direction has shape \[2, 32\]: give \[31\]"):
        compiled(torch.randn(4, 31, device=rest[0].device))


def dense(*shape, device="cpu", dtype=torch.float32):
    return torch.randn(*shape, device=device).to(dtype)


def permuted(*shape, device="cpu", dtype=torch.float32):
    return torch.randn(*reversed(shape), device=device).to(dtype).permute(*reversed(range(len(shape))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_opcheck(device, backend, dtype):
    layout, parts = dense if dtype == torch.float32 else permuted, ["schema", "autograd_registration", "faketensor"]
    if (
        dtype == torch.bfloat16
    ):  # of one dtype, as it takes the longest, and whether an operator compiles depends on none
        parts.append("aot_dispatch_dynamic")
    ops, opcheck = torch.ops.procon, partial(torch.library.opcheck, test_utils=[f"test_{part}" for part in parts])
    computed = torch.float64 if dtype == torch.float64 else torch.float32
    hidden = layout(3, 4, 16, device=device, dtype=dtype)
    direction, anchor, weight = (dense(*s, device=device, dtype=computed) for s in ((2, 16), (12, 2), (12,)))
    opcheck(ops.project.default, (backend, hidden, direction))
    reach = 0.01 * direction.norm(dim=1)
    for given in ((anchor, weight.abs(), "absolute", reach), (None, None, "squared")):
        opcheck(ops.penalize.default, (backend, hidden, direction, *given))
    tail = (anchor, direction, dtype)
    for incoming, upstream in ((hidden, weight), (None, weight[0]), (None, None)):
        opcheck(ops.accumulate_gradient.default, (backend, incoming, upstream, *tail))
    norm_weight = dense(16, device=device, dtype=dtype)
    for casting, given in (("llama", (direction, anchor, weight.abs())), ("gemma", (None, None, None))):
        arguments = (backend, hidden, norm_weight, 1e-6, casting, 1.0, *given, "absolute", reach)
        opcheck(ops.rms_norm_penalize.default, arguments)
        normed, inverse_rms, _, coefficient = ops.rms_norm_penalize(*arguments)
        for upstream, needs_weight in ((weight[0], True), (None, False)):
            upstream = None if given[0] is None else upstream
            saved = (hidden, norm_weight, inverse_rms, coefficient, given[0], 1.0, needs_weight)
            incoming = layout(*hidden.shape, device=device, dtype=normed.dtype)
            opcheck(ops.rms_norm_gradient.default, (backend, incoming, upstream, *saved))
