"""What ``torch.compile`` is told of the operators' results, without running them, is what they give."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from procon.ops import operators  # noqa: F401  # registers them

OPS = torch.ops.procon
SHAPE, K = (3, 4, 16), 2

#: Of the hidden states and of the norm's weight.
DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float64, torch.float64),
]


def calls(dtype: torch.dtype, weight_dtype: torch.dtype) -> Iterator[tuple]:
    """Operators, and arguments that say what their results are like."""
    computed = torch.float64 if dtype == torch.float64 else torch.float32
    hidden, norm_weight = torch.randn(SHAPE).to(dtype), torch.randn(16).to(weight_dtype)
    direction, coefficient, anchor = (torch.randn(*shape).to(computed) for shape in ((K, 16), (12, K), (12, K)))
    weight = torch.rand(12).to(computed)
    yield OPS.project, hidden, direction, "eager"
    for given in ((anchor, weight), (None, None)):
        yield OPS.penalize, hidden, direction, *given, "huber", 0.0, "fall", "eager"
    tail = coefficient, direction, list(SHAPE), dtype, "eager"
    yield OPS.accumulate_gradient, hidden, weight, *tail
    yield OPS.accumulate_gradient, None, None, *tail
    for casting in ("llama", "gemma"):
        for given in ((direction, anchor, weight), (None, None, None)):
            yield OPS.rms_norm_penalize, hidden, norm_weight, 1e-6, casting, 0.0, *given, "huber", 0.0, "fall", "eager"
    inverse_rms = torch.rand(12).to(computed)
    for needs_weight in (True, False):
        for given in ((coefficient, direction), (coefficient[:, :0], None)):
            saved = hidden, norm_weight, inverse_rms, *given
            yield OPS.rms_norm_gradient, hidden, None, *saved, 0.0, needs_weight, "eager"


def described(result: Tensor | tuple[Tensor, ...]) -> list[tuple]:
    results = [result] if isinstance(result, Tensor) else result
    return [(each.dtype, tuple(each.shape), each.stride(), each.device) for each in results]


@pytest.mark.parametrize("dtypes", DTYPES)
def test_results_are_as_announced(dtypes):
    for operator, *arguments in calls(*dtypes):
        with FakeTensorMode() as mode:
            fakes = [mode.from_tensor(given) if isinstance(given, Tensor) else given for given in arguments]
            announced = operator(*fakes)
        assert described(announced) == described(operator(*arguments)), operator
