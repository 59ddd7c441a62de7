"""From the public functions, and from a model under the constraint, down to the kernels: on a GPU or a played one."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernels are written in it")

from procon.ops import constrain, project, projection_penalty, rms_norm, rms_norm_constrain

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_empty")]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPS = 1e-5


@pytest.fixture
def operands() -> dict[str, Tensor]:
    """Two sequences of unequal length, padded with NaN: the padding has weight 0."""
    make = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 11, 300, generator=make)
    direction = torch.nn.functional.normalize(torch.randn(3, 300, generator=make), dim=-1)
    weight = torch.rand(2, 11, generator=make)
    weight[1, 7:] = 0
    anchor = hidden @ direction.T + torch.randn(2, 11, 3, generator=make)
    anchor[1, 7:] = float("nan")
    return {
        "hidden": hidden,
        "direction": direction,
        "anchor": anchor,
        "weight": weight,
        "norm_weight": 1 + 0.3 * torch.randn(300, generator=make),
        "incoming": torch.randn(2, 11, 300, generator=make),
    }


def by_definition(x: Tensor, given: dict[str, Tensor]) -> Tensor:
    live = given["weight"] != 0
    e = (x @ given["direction"].T - given["anchor"])[live]
    return (e.square().sum(-1) * given["weight"][live]).sum()


#: Each function of the hidden states and what is given beside them, and its definition. Results are the hidden states
#: that go on, or None, and the loss.
FUNCTIONS: dict[str, tuple[Callable, Callable]] = {
    "project": (
        lambda x, g: (None, project(x, g["direction"]).square().sum()),
        lambda x, g: (None, (x @ g["direction"].T).square().sum()),
    ),
    "projection_penalty": (
        lambda x, g: (None, projection_penalty(x, g["direction"], g["anchor"], g["weight"])),
        lambda x, g: (None, by_definition(x, g)),
    ),
    "constrain": (
        lambda x, g: constrain(x, g["direction"], g["anchor"], g["weight"]),
        lambda x, g: (x, by_definition(x, g)),
    ),
    "rms_norm": (
        lambda x, g: (rms_norm(x, g["norm_weight"], EPS), 0),
        lambda x, g: (torch.nn.functional.rms_norm(x, (300,), g["norm_weight"], EPS), 0),
    ),
    "rms_norm_constrain": (
        lambda x, g: rms_norm_constrain(x, g["norm_weight"], EPS, g["direction"], g["anchor"], g["weight"]),
        lambda x, g: (
            torch.nn.functional.rms_norm(x, (300,), g["norm_weight"], EPS),
            by_definition(x, g),
        ),
    ),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_functions_and_their_gradients(operands, function, dtype):
    """Gradients of hidden states and of the norm's weight, against the definition in float64."""

    def run(which: int, given: dict[str, Tensor]) -> list[Tensor]:
        x, v = given["hidden"].requires_grad_(), given["norm_weight"].requires_grad_()
        onward, loss = FUNCTIONS[function][which](x, given)
        total = 0.3 * loss
        if onward is not None:
            total = total + (onward.to(given["incoming"].dtype) * given["incoming"]).sum()
        total.backward()
        return [part.double().cpu() for part in (total.detach(), x.grad, v.grad) if part is not None]

    rounded = {"hidden", "norm_weight", "incoming"}
    given = {name: value.to(dtype) if name in rounded else value for name, value in operands.items()}
    exact = run(1, {name: value.double() for name, value in given.items()})
    found = run(0, {name: value.to("cuda") for name, value in given.items()})
    assert len(found) == len(exact) == (3 if "rms_norm" in function else 2)
    for one, other in zip(found, exact, strict=True):
        # Three roundings to the dtype: of the states that go on, of the gradient that arrives, of the result.
        allowed = (3 * torch.finfo(dtype).eps + 1e-5) * other.norm()
        assert (one - other).norm() <= allowed, function


def test_operators_are_the_functions(operands):
    """What a graph of torch.compile holds."""
    given = {name: value.to("cuda") for name, value in operands.items()}
    hidden, direction = given["hidden"].flatten(0, 1), given["direction"]
    rest = (direction, given["anchor"].flatten(0, 1), given["weight"].flatten())
    norm = (hidden, given["norm_weight"], EPS, "llama", 0.0)
    from procon.kernels import projection_penalty as kernels
    from procon.kernels import rms_norm_penalty as norm_kernels

    operators = torch.ops.procon
    options = ("absolute", 0.01 * direction.norm(dim=1))
    found = operators.penalize("triton", hidden, *rest, *options)
    coefficient = found[1]
    assert all(map(torch.equal, found, kernels.penalize(hidden, *rest, *options)))
    assert torch.equal(operators.project("triton", hidden, direction), kernels.project(hidden, direction))
    normed = operators.rms_norm_penalize("triton", *norm, *rest, *options)
    assert all(map(torch.equal, normed, norm_kernels.rms_norm_penalize(*norm, *rest, *options)))
    upstream = torch.tensor(0.3).to("cuda")
    added = (hidden, upstream, coefficient, direction)
    assert torch.equal(
        operators.accumulate_gradient("triton", *added, hidden.dtype),
        kernels.accumulate_gradient(*added, hidden.dtype),
    )
    saved = (hidden, upstream, hidden, given["norm_weight"], normed[1], normed[3], direction, 0.0, True)
    assert all(map(torch.equal, operators.rms_norm_gradient("triton", *saved), norm_kernels.rms_norm_gradient(*saved)))


MODELS = [
    ("llama", "auto", torch.float32, {"penalty": "squared"}),
    ("llama", "auto", torch.bfloat16, {"penalty": "squared"}),
    ("llama", "never", torch.float32, {"penalty": "absolute"}),
    ("llama", "auto", torch.float32, {"penalty": "absolute"}),
    ("gemma2", "auto", torch.float32, {"penalty": "absolute"}),
    ("gpt2", "auto", torch.float32, {"penalty": "squared"}),
]


@pytest.mark.parametrize(("family", "fuse", "dtype", "settings"), MODELS)
def test_a_model_under_the_constraint(tiny_model, random_directions, family, fuse, dtype, settings):
    """Penalty and every gradient as from the PyTorch path on a CPU; in bfloat16, as near to float32 as that is."""
    from procon.constraint import ProjectionConstraint

    make = torch.Generator().manual_seed(3)
    model = tiny_model(family).eval()  # GPT-2 has dropout
    directions = random_directions(model)
    ids = torch.randint(5, 60, (2, 9), generator=make)
    anchors = torch.randn(2, 9, 3, generator=make)
    mask = (torch.rand(2, 9, generator=make) < 0.6).float()

    def step(backend: str, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
        copied = copy.deepcopy(model).to(dtype).to(device)
        constraint = ProjectionConstraint(directions, backend=backend, **settings)
        with constraint.attach(copied, fuse=fuse):
            assert constraint.fused == (() if family == "gpt2" or fuse == "never" else (0, 1, 2))
            constraint.set_target(anchors.to(device), mask.to(device))
            loss = copied(ids.to(device), labels=ids.to(device)).loss
            penalty = constraint.penalty()
            (loss + 3 * penalty).backward()
        gradients = {name: p.grad for name, p in copied.named_parameters() if p.grad is not None}
        return {name: value.detach().float().cpu() for name, value in {"penalty": penalty, **gradients}.items()}

    compiled, eager = step("triton", "cuda", dtype), step("eager", "cpu", dtype)
    exact = eager if dtype == torch.float32 else step("eager", "cpu", torch.float32)
    assert compiled.keys() == eager.keys()
    for name, value in exact.items():
        allowed = 2 * (eager[name] - value).norm() + 1e-4 * value.norm() + 1e-9
        assert (compiled[name] - value).norm() <= allowed, name


def test_a_trainer_under_the_constraint(make_trainer):
    """Penalties of its steps on the device as on the CPU."""
    logged = []
    for on_cpu in (True, False):
        run = make_trainer("Trainer", "procon_s:1", use_cpu=on_cpu, max_steps=2, save_strategy="no", folder=str(on_cpu))
        run.train()
        logged.append([row["procon/penalty"] for row in run.state.log_history if "procon/penalty" in row])
    assert len(logged[0]) == 2
    assert logged[1] == pytest.approx(logged[0], rel=1e-3, abs=1e-9)
