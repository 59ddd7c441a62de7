"""The PyTorch path works tile by tile: their height, and that no result depends on it."""

import pytest
import torch
from torch import Tensor

from procon.eager import projection_penalty, rms_norm_penalty, tiles

DTYPES = (torch.float32, torch.bfloat16, torch.float64)

pytestmark = pytest.mark.usefixtures("poisoned_empty")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 576, 4096, 2**20 - 1])
def test_a_tile_is_the_tallest_within_its_bytes(columns, dtype):
    for device, budget in (("cpu", 4 * 2**20), ("meta", 64 * 2**20)):
        height = tiles.tile_height(torch.empty(0, dtype=dtype, device=device), columns)
        row = columns * dtype.itemsize
        assert (height - 1) * row < budget
        assert height * row <= max(budget, row) < (height + 1) * row


def test_a_row_longer_than_a_tile_is_one():
    assert tiles.tile_height(torch.empty(0), 2**22) == 1


@pytest.mark.parametrize("rows", [0, 1, 3, 4, 7, 8, 9])
@pytest.mark.parametrize("height", [1, 4, 8])
def test_tiles_are_the_whole(rows, height):
    one, other = torch.randn(rows, 5), torch.randn(rows)
    parts = list(tiles.tiled(height, one, other))
    assert len(parts) == max(1, -(-rows // height))
    assert all(len(a) == len(b) <= height for a, b in parts)
    assert torch.equal(torch.cat([a for a, _ in parts]), one)
    assert torch.equal(torch.cat([b for _, b in parts]), other)
    # Views, which are written to.
    assert all(a.untyped_storage().data_ptr() == one.untyped_storage().data_ptr() for a, _ in parts)


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
    options = direction, given["anchor"], given["weight"], "absolute", 0.05
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
