"""Set-up shared by all tests: Triton's interpreter where there is no GPU, poisoned allocations, the fp64 oracle."""

import os
import sys
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

# Triton reads it when a kernel is declared, so it has to be there before anything imports procon.kernels.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA or ROCm GPU; this machine has none"))


@pytest.fixture(autouse=True)
def _no_backend_from_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PROCON_BACKEND", raising=False)


@pytest.fixture
def device() -> str:
    """Where the kernels can run: the GPU, or the CPU through Triton's interpreter."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that the library takes uninitialised holds NaN, so that an element it forgets to write shows."""

    def poison(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocate(*args, **kwargs) -> Tensor:
            tensor = original(*args, **kwargs)
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if caller.split(".")[0] == "procon" and tensor.is_floating_point():
                tensor.fill_(float("nan"))
            return tensor

        return allocate

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))


class Expected(NamedTuple):
    """What the fused op should give, in float64."""

    projection: Tensor  # [N, K]
    scale: Tensor  # [N, K]: sum of |h||r|, to which rounding errors of the projection are proportional
    token_penalty: Tensor  # [N]
    coefficient: Tensor  # [N, K]
    gradient: Tensor  # [N, D], of the sum of the penalties alone


@pytest.fixture
def oracle() -> Callable[..., Expected]:
    """The op by definition in float64, its gradient from autograd, over the live tokens only."""

    def compute(
        hidden: Tensor, direction: Tensor, anchor: Tensor | None, weight: Tensor | None, penalty: str = "squared"
    ) -> Expected:
        h, r = hidden.detach().double().cpu(), direction.double().cpu()
        a = torch.zeros(len(h), len(r)).double() if anchor is None else anchor.double().cpu()
        w = torch.ones(len(h)).double() if weight is None else weight.double().cpu()
        live = w.nonzero().squeeze(1)
        x = h[live].requires_grad_()
        z = (x[:, None, :] * r).sum(-1)
        z.retain_grad()
        e = z - a[live]
        phi = {
            "squared": e.square(),
            "absolute": e.abs(),
            "huber": torch.where(e.abs() <= 1, e.square() / 2, e.abs() - 0.5),
        }[penalty]
        tokens = w[live] * phi.sum(-1)
        tokens.sum().backward()

        def scatter(values: Tensor) -> Tensor:
            return torch.zeros(len(h), *values.shape[1:]).double().index_copy(0, live, values.detach())

        return Expected(
            (h[:, None, :] * r).sum(-1),
            (h.abs()[:, None, :] * r.abs()).sum(-1),
            scatter(tokens),
            scatter(z.grad),
            scatter(x.grad),
        )

    return compute
