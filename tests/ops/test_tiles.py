"""The PyTorch path works tile by tile, and no result depends on their height."""

import pytest
import torch
from torch import Tensor

from procon.eager import projection_penalty, rms_norm_penalty, tiles

DTYPES = (torch.float32, torch.bfloat16, torch.float64)

pytestmark = pytest.mark.usefixtures("poisoned_empty")


def inputs(dtype: torch.dtype, rows: int = 10, size: int = 24, k: int = 3) -> dict[str, Tensor]:
    make = torch.Generator().manual_seed(5)
    computed = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=make).to(computed)

    return {
        "hidden": normal(rows, size).to(dtype),
        "incoming": normal(rows, size).to(dtype),
        "norm_weight": (1 + normal(size) / 4).to(dtype),
        "direction": normal(k, size) / size**0.5,
        "anchor": normal(rows, k),
        "weight": normal(rows).relu(),
        "coefficient": normal(rows, k),
        "upstream": normal(rows),
    }


def every_function(given: dict[str, Tensor], casting: str) -> dict[str, Tensor]:
    hidden, incoming, norm_weight = given["hidden"], given["incoming"], given["norm_weight"]
    direction, coefficient, upstream = given["direction"], given["coefficient"], given["upstream"]
    options = direction, given["anchor"], given["weight"], "absolute", 0.05 * direction.norm(dim=1)
    names = "normed", "inverse rms", "norm's tokens", "norm's coefficient"
    found = dict(
        zip(names, rms_norm_penalty.rms_norm_penalize(hidden, norm_weight, 1e-5, casting, 0.5, *options), strict=True)
    )
    saved = hidden, norm_weight, found["inverse rms"], coefficient, direction, 0.5
    pair = rms_norm_penalty.rms_norm_gradient(incoming, upstream[0], *saved, True)
    found["norm's gradient"], found["weight's gradient"] = pair
    found["norm's gradient alone"], _ = rms_norm_penalty.rms_norm_gradient(incoming, None, *saved, False)
    found["projection"] = projection_penalty.project(hidden, direction)
    found["tokens"], found["coefficient"] = projection_penalty.penalize(hidden, *options)
    arguments = upstream, coefficient, direction
    found["gradient"] = projection_penalty.accumulate_gradient(incoming, *arguments, hidden.dtype)
    found["gradient alone"] = projection_penalty.accumulate_gradient(None, *arguments, hidden.dtype)
    return found


@pytest.mark.parametrize("height", [1, 3, 5, 9])
@pytest.mark.parametrize("casting", ["llama", "gemma"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_result_depends_on_the_height(monkeypatch, dtype, casting, height):
    given = inputs(dtype)
    whole = every_function(given, casting)
    monkeypatch.setattr(tiles, "_TILE_BYTES_ON_CPU", height * 24 * given["direction"].element_size())
    assert tiles.tile_height(given["direction"], 24) == height
    for name, part in every_function(given, casting).items():
        # Sums of up to 24 terms in another order; in half precision, a result on the other side of a rounding.
        eps = torch.finfo(part.dtype).eps
        terms = 1 if part.dtype == torch.bfloat16 else 24
        torch.testing.assert_close(
            part, whole[name], rtol=eps, atol=terms * eps * whole[name].abs().max().item(), msg=name
        )
