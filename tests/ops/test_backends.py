"""The backend that is chosen is the one that runs, forward and backward; the device is that of the hidden states."""

from collections.abc import Callable
from importlib import import_module

import pytest
import torch
from torch import Tensor

from procon.errors import ProConError
from procon.ops import constrain, project, projection_penalty, rms_norm, rms_norm_constrain

FUNCTIONS: dict[str, Callable[[Tensor, str], Tensor]] = {
    "project": lambda x, backend: project(x, torch.ones(2, 8), backend=backend).sum(),
    "projection_penalty": lambda x, backend: projection_penalty(x, torch.ones(8), backend=backend),
    "constrain": lambda x, backend: sum(part.sum() for part in constrain(x, torch.ones(8), backend=backend)),
    "its penalty alone": lambda x, backend: constrain(x, torch.ones(8), backend=backend)[1],
    "rms_norm": lambda x, backend: rms_norm(x, torch.ones(8), 1e-6, backend=backend).sum(),
    "rms_norm_constrain": lambda x, backend: sum(
        part.sum() for part in rms_norm_constrain(x, torch.ones(8), 1e-6, torch.ones(8), backend=backend)
    ),
    "its penalty without the norm": lambda x, backend: rms_norm_constrain(
        x, torch.ones(8), 1e-6, torch.ones(8), backend=backend
    )[1],
}
OPERATORS = {
    "projection_penalty": ("project", "penalize", "accumulate_gradient"),
    "rms_norm_penalty": ("rms_norm_penalize", "rms_norm_gradient"),
}


@pytest.fixture
def ran(monkeypatch) -> list[str]:
    """The backends whose operators were called, in order."""
    pytest.importorskip("triton", reason="the kernels are written in Triton")
    calls = []

    def noted(name: str, function: Callable) -> Callable:
        def call(*arguments):
            calls.append(name)
            return function(*arguments)

        return call

    for name, package in (("eager", "eager"), ("triton", "kernels")):
        for file, functions in OPERATORS.items():
            module = import_module(f"procon.{package}.{file}")
            for function in functions:
                monkeypatch.setattr(module, function, noted(name, getattr(module, function)))
    return calls


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_chosen_backend_runs(ran, device, function, backend):
    hidden = torch.randn(3, 8, requires_grad=True)
    FUNCTIONS[function](hidden, backend).backward()
    assert set(ran) == {backend}
    assert len(ran) >= 2
    assert hidden.grad.any()


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_device_is_that_of_the_hidden_states(monkeypatch, function):
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(ProConError, match=r"^backend is 'triton' but hidden is on cpu: move it to a GPU"):
        FUNCTIONS[function](torch.randn(3, 8), "triton")


def test_what_the_environment_says_is_what_auto_runs(ran, monkeypatch):
    for chosen in ("eager", "triton"):
        monkeypatch.setenv("PROCON_BACKEND", chosen)
        for function in FUNCTIONS.values():
            function(torch.randn(3, 8, requires_grad=True), "auto").backward()
        assert set(ran) == {chosen}
        ran.clear()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.bool, torch.int32])
def test_a_mean_is_over_as_many_tokens_as_there_are(dtype):
    """1001 tokens are 1000 in bfloat16."""
    hidden, direction = torch.randn(1001, 8), torch.randn(8)
    mean = projection_penalty(hidden, direction, None, torch.ones(1001).to(dtype), reduction="mean", backend="eager")
    expected = (hidden.double() @ direction.double()).square().mean()
    torch.testing.assert_close(mean.double(), expected, rtol=2e-6, atol=0)
