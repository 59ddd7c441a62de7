"""Is the public edge sound? Shapes and dtypes that come back, reductions, choice of backend, every error message."""

import re
import subprocess
import sys
import warnings

import pytest
import torch
import torch.distributed as dist

from procon.errors import ProConError
from procon.ops import backends, constrain, project, projection_penalty, rms_norm, rms_norm_constrain

HIDDEN = torch.randn(2, 3, 8)
ONE = torch.randn(8)
SEVERAL = torch.randn(4, 8)


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize(("lead", "k"), [((), None), ((5,), 1), ((2, 3), 4), ((2, 0), 4), ((2, 1, 3), None)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_shapes_and_dtypes(backend, lead, k, dtype):
    hidden = torch.randn(*lead, 8, dtype=dtype)
    several = (k,) if k else ()
    direction, weight = torch.randn(*several, 8), torch.rand(lead)
    # Of one block among several, as users cut them out: every direction's and every token's stride is its own.
    anchor = torch.randn((*lead, *several, 3))[..., 1]
    computed = torch.float64 if dtype == torch.float64 else torch.float32

    projection = project(hidden, direction, backend=backend)
    assert projection.shape == anchor.shape
    assert projection.dtype == computed
    by_definition = torch.einsum("...d,kd->...k", hidden.to(computed), direction.to(computed).reshape(-1, 8))
    by_definition = by_definition.reshape(anchor.shape)
    torch.testing.assert_close(projection, by_definition, rtol=1e-4, atol=1e-5)

    same, penalty = constrain(hidden, direction, anchor, weight, backend=backend)
    assert same.data_ptr() == hidden.data_ptr()
    assert same.shape == hidden.shape
    assert penalty.shape == ()
    assert penalty.dtype == computed
    tokens = projection_penalty(hidden, direction, anchor, weight, reduction="none", backend=backend)
    assert tokens.shape == lead
    departure = (by_definition - anchor).reshape(*lead, k or 1)
    torch.testing.assert_close(tokens, weight.to(computed) * departure.square().sum(-1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(tokens.sum(), penalty)
    torch.testing.assert_close(projection_penalty(hidden, direction, anchor, weight, backend=backend), penalty)
    _, beside_norm = rms_norm_constrain(hidden, torch.ones(8), 1e-6, direction, anchor, weight, backend=backend)
    torch.testing.assert_close(beside_norm, penalty, rtol=1e-4, atol=1e-5)


def test_any_layout_of_hidden_states_gives_the_same_numbers():
    hidden = torch.randn(6, 5, 8)
    reference = project(hidden, SEVERAL)
    feature_first = hidden.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    torch.testing.assert_close(project(feature_first, SEVERAL), reference)
    swapped = hidden.transpose(0, 1).contiguous().transpose(0, 1)
    torch.testing.assert_close(project(swapped, SEVERAL), reference)
    torch.testing.assert_close(project(hidden[:, 1:4], SEVERAL), reference[:, 1:4])
    torch.testing.assert_close(project(hidden[0, 0].expand(6, 5, 8), SEVERAL)[3, 2], reference[0, 0])


def test_a_mask_is_a_weight():
    mask = torch.tensor([[True, False, True], [False, False, True]])
    for weight in (mask, mask.long(), mask.half()):
        _, penalty = constrain(HIDDEN, ONE, None, weight)
        torch.testing.assert_close(penalty, (HIDDEN[mask] @ ONE).square().sum())


class TestMean:
    def test_divides_by_the_weights(self):
        weight = torch.tensor([[0.5, 0.0, 0.25], [0.0, 0.0, 0.1]])
        total = projection_penalty(HIDDEN, ONE, None, weight)
        mean = projection_penalty(HIDDEN, ONE, None, weight, reduction="mean")
        torch.testing.assert_close(mean, total / 0.85)

    def test_divides_by_the_tokens_without_weights(self):
        mean = projection_penalty(HIDDEN, SEVERAL, reduction="mean")
        torch.testing.assert_close(mean, projection_penalty(HIDDEN, SEVERAL) / 6)

    @pytest.mark.parametrize(
        ("hidden", "weight"),
        [(HIDDEN, torch.zeros(2, 3)), (HIDDEN[:, :0], torch.zeros(2, 0)), (HIDDEN[:, :0], None)],
        ids=["all masked", "empty", "empty without weights"],
    )
    def test_nothing_to_average_is_zero(self, hidden, weight):
        hidden = hidden.clone().requires_grad_()
        mean = projection_penalty(hidden, ONE, None, weight, reduction="mean")
        mean.backward()
        assert mean.item() == 0
        assert (hidden.grad == 0).all()


BAD = {
    "norm_weight of another size": (
        lambda: rms_norm(HIDDEN, torch.ones(7), 1e-6),
        "norm_weight is torch.float32 [7]: give floating [8] to match hidden",
    ),
    "norm_weight of integers": (
        lambda: rms_norm(HIDDEN, torch.ones(8).long(), 1e-6),
        "norm_weight is torch.int64 [8]: give floating [8]",
    ),
    "norm_weight elsewhere": (
        lambda: rms_norm(HIDDEN, torch.ones(8, device="meta"), 1e-6),
        "norm_weight is on meta but hidden is on cpu: move norm_weight there",
    ),
    "casting misspelt": (
        lambda: rms_norm_constrain(HIDDEN, torch.ones(8), 1e-6, ONE, casting="lama"),
        "casting is 'lama': choose one of llama, gemma",
    ),
    "anchor of the norm": (
        lambda: rms_norm_constrain(HIDDEN, torch.ones(8), 1e-6, ONE, torch.zeros(3, 2)),
        "anchor has shape [3, 2]: give [2, 3], that of the projections",
    ),
    "hidden of integers": (lambda: project(HIDDEN.long(), ONE), "hidden is torch.int64: convert it to float16"),
    "hidden a scalar": (lambda: project(torch.tensor(1.0), ONE), "hidden has shape []: give [..., D]"),
    "hidden without features": (lambda: project(torch.zeros(3, 0), ONE), "hidden has shape [3, 0]: give [..., D]"),
    "direction of another size": (
        lambda: project(HIDDEN, torch.randn(7)),
        "direction has shape [7]: give [8] or [K, 8] to match hidden",
    ),
    "direction with three dimensions": (
        lambda: project(HIDDEN, torch.randn(1, 1, 8)),
        "direction has shape [1, 1, 8]: give [8] or [K, 8]",
    ),
    "too many directions": (lambda: project(HIDDEN, torch.randn(9, 8)), "direction holds 9 directions: give 1 to 8"),
    "no directions": (lambda: project(HIDDEN, torch.randn(0, 8)), "direction holds 0 directions: give 1 to 8"),
    "direction complex": (lambda: project(HIDDEN, ONE.cfloat()), "direction is torch.complex64: give real numbers"),
    "direction elsewhere": (
        lambda: project(HIDDEN, ONE.to("meta")),
        "direction is on meta but hidden is on cpu: move direction there",
    ),
    "direction with a gradient": (
        lambda: project(HIDDEN, ONE.clone().requires_grad_()),
        "direction requires a gradient, but only hidden gets one: pass direction.detach()",
    ),
    "anchor without directions": (
        lambda: constrain(HIDDEN, SEVERAL, torch.zeros(2, 3)),
        "anchor has shape [2, 3]: give [2, 3, 4], that of the projections",
    ),
    "weight of another shape": (
        lambda: constrain(HIDDEN, SEVERAL, None, torch.ones(2, 3, 4)),
        "weight has shape [2, 3, 4]: give [2, 3], one number for each token",
    ),
    "weight a number": (lambda: constrain(HIDDEN, ONE, None, 1.0), "weight is a float: give a dense torch.Tensor"),
    "unknown penalty": (
        lambda: constrain(HIDDEN, ONE, penalty="l2"),
        "penalty is 'l2': choose one of squared, absolute",
    ),
    "unknown reduction": (
        lambda: projection_penalty(HIDDEN, ONE, reduction="avg"),
        "reduction is 'avg': choose one of sum, mean, none",
    ),
    "unknown backend": (
        lambda: project(HIDDEN, ONE, backend="cuda"),
        "backend is 'cuda': choose one of auto, triton, eager",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_errors_name_the_argument_and_the_remedy(case):
    call, message = BAD[case]
    with pytest.raises(ProConError, match="^" + re.escape(message)) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["hidden", "direction", "anchor", "weight", "norm_weight"])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested")
def test_tensors_that_are_not_dense_are_refused_by_name(name):
    dense = {"hidden": HIDDEN, "direction": SEVERAL, "anchor": torch.zeros(2, 3, 4), "weight": torch.ones(2, 3)}
    dense["norm_weight"] = ONE
    for kind in (dense[name].to_sparse(), torch.nested.nested_tensor([ONE, ONE[:2]], layout=torch.jagged)):
        given = {**dense, name: kind}
        hidden, direction, anchor, weight, norm_weight = given.values()
        with pytest.raises(ProConError, match=f"^{name} is a .*: give a dense torch.Tensor"):
            rms_norm_constrain(hidden, norm_weight, 1e-6, direction, anchor, weight)


def test_distributed_tensors_are_refused_by_name():
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import distribute_tensor

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        sharded = distribute_tensor(HIDDEN, DeviceMesh("cpu", [0]))
        with pytest.raises(
            ProConError, match=r"^hidden is a DTensor: give a dense torch.Tensor, of a sharded one what"
        ):
            constrain(sharded, ONE)
    finally:
        dist.destroy_process_group()


class TestBackend:
    @pytest.fixture
    def chosen(self, monkeypatch):
        """What is chosen for tensors on a type of device, without having the device; or Triton."""
        monkeypatch.setattr(backends, "_triton_installed", lambda: True)
        backends._warn_that_triton_is_missing.cache_clear()
        return backends.choose_backend

    def test_auto_follows_the_device(self, chosen):
        assert chosen("auto", "cpu") == "eager"
        assert chosen("auto", "cuda") == "triton"

    def test_environment_says_what_auto_means(self, chosen, monkeypatch):
        monkeypatch.setenv("PROCON_BACKEND", "eager")
        assert chosen("auto", "cuda") == "eager"
        assert chosen("triton", "cuda") == "triton"
        monkeypatch.setenv("PROCON_BACKEND", "fast")
        with pytest.raises(ProConError, match="the environment variable PROCON_BACKEND is 'fast': choose one of"):
            chosen("auto", "cuda")

    def test_missing_triton_warns_once_and_falls_back(self, chosen, monkeypatch):
        monkeypatch.setattr(backends, "_triton_installed", lambda: False)
        with pytest.warns(UserWarning, match="Triton is not installed"):
            assert chosen("auto", "cuda") == "eager"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert chosen("auto", "cuda") == "eager"
            assert chosen("auto", "cpu") == "eager"
        with pytest.raises(ProConError, match="backend is 'triton' but Triton is not installed: pip install triton"):
            chosen("triton", "cuda")

    def test_triton_on_cpu_needs_the_interpreter(self, chosen, monkeypatch):
        triton = pytest.importorskip("triton")
        monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
        with pytest.raises(ProConError, match="backend is 'triton' but hidden is on cpu: move it to a GPU"):
            chosen("triton", "cpu")

    @pytest.mark.parametrize("triton", ["installed", "missing"])
    def test_import_and_use_without_triton_or_transformers(self, triton):
        program = """
import sys
if sys.argv[1] == "missing":
    sys.modules["triton"] = None
import torch
from procon.ops import constrain
_, penalty = constrain(torch.ones(3, 4), torch.ones(4))
assert penalty.item() == 48, penalty
assert "transformers" not in sys.modules
assert not any(name.startswith("procon.kernels.") for name in sys.modules)
assert not sys.modules.get("triton")
assert "torch._dynamo" not in sys.modules
"""
        subprocess.run([sys.executable, "-c", program, triton], check=True)

    def test_its_mark_is_the_one_that_torch_compile_sets(self):
        def constant() -> int:
            return 0

        torch.compiler.assume_constant_result(constant)
        assert vars(constant) == {"_dynamo_marked_constant": True} == vars(backends.choose_backend)
