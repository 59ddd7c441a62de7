"""The op's package for the hub of kernels, as the package ``kernels`` loads it."""

import re

import pytest
import torch

import procon
from benchmarks import hub

kernels = pytest.importorskip("kernels")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "op"
    hub.build(folder)
    return folder


@pytest.fixture
def op(folder):
    return kernels.get_local_kernel(folder)


def results(function, backend, device, *of_norm):
    """Value and gradients, with the norm's weight if ``of_norm`` has it."""
    torch.manual_seed(0)
    hidden, direction, anchor = (torch.randn(*shape, device=device) for shape in ((5, 48), (2, 48), (5, 2)))
    leaves = [tensor.to(device, copy=True).requires_grad_() for tensor in (hidden, *of_norm[:1])]
    weight = torch.rand(5, device=device)
    passed, penalty = function(*leaves, *of_norm[1:], direction, anchor, weight, penalty="absolute", backend=backend)
    return passed, penalty, *torch.autograd.grad(passed.square().sum() + penalty, leaves)


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize(("name", "of_norm"), [("constrain", ()), ("rms_norm_constrain", (torch.rand(48), 1e-6))])
def test_the_package_computes_what_the_library_does(op, name, of_norm, backend, device):
    found = results(getattr(op, name), backend, device, *of_norm)
    torch.testing.assert_close(found, results(getattr(procon, name), "eager", device, *of_norm))
    assert getattr(op, name).__module__.startswith(op.__name__)


def test_its_operators_are_its_own_in_a_compiled_graph(op, device):
    hidden, direction = torch.randn(3, 32, device=device), torch.randn(32, device=device)
    compiled = torch.compile(lambda hidden: op.constrain(hidden, direction)[1], backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(hidden), procon.constrain(hidden, direction)[1])
    assert hasattr(getattr(torch.ops, op.__name__), "penalize")


def test_it_has_the_op_alone(folder, op):
    """With the digest that its metadata state, and its own error."""
    for variant in (folder / "build").glob("torch-*"):
        digest = kernels.Metadata.read_from_file(variant / "metadata.json").digest
        digest.validate(type(digest).hash_variant(digest.algorithm, variant))
        texts = "".join(path.read_text() for path in variant.rglob("*.py"))
        assert not re.search(r"^\s*(from|import) procon|class ProConSettings|EXTRAS", texts, re.MULTILINE)
    with pytest.raises(op.ProConError, match="backend is 'neither': choose one of auto, triton, eager"):
        op.project(torch.zeros(2, 3), torch.zeros(3), backend="neither")
