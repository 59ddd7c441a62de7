"""Every kernel, by its launcher, at shapes that fit no tile, against float64: on a GPU, or on one that ttsem plays.

Cases cover every pair of choices, such as each size with each dtype: what goes wrong for one choice, or for two
together, shows. Tolerances count roundings. A sum of D terms adds log2 D of them in a tree, at most 14 here, and with
those around it 16: of the terms' magnitude, in float32. Then comes one rounding to the dtype of the result.
"""

import random
from itertools import combinations, product
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernels are written in it")

from procon.kernels import launch, rms_norm_penalty
from procon.kernels.projection_penalty import accumulate_gradient, penalize, project
from procon.kernels.rms_norm_penalty import rms_norm_gradient, rms_norm_penalize

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_empty")]

#: Of the norm. Large, so that a result shows whether it is there.
EPS = 0.3
SUM = 16 * torch.finfo(torch.float32).eps

#: Several rounds of programs, of which the GPU that ttsem plays has four, and no multiple of a tile's rows.
MANY = 37
#: And fewer than programs.
ROWS = (1, 3, MANY)
#: All but one are of no tile, and one is beyond the rows that the norm's backward keeps in registers.
SIZES = (40, 64, 300, 896, 2056, 8200)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = {"rows": ROWS, "size": SIZES, "dtype": DTYPES, "k": (1, 3, 8)}
#: Dtypes of the hidden states and of the norm's weight.
NORM_DTYPES = (*((dtype, dtype) for dtype in DTYPES), (torch.bfloat16, torch.float32))
#: Casting and offset.
RULES = (("llama", 0.0), ("gemma", 1.0), ("gemma", 0.0))
#: Kind, and the share of ``|h| |r|`` that may be rounding.
PENALTIES = (("squared", 0.0), ("absolute", 0.0), ("absolute", 0.01))
#: What is given beside the directions.
COMPANIONS = ("anchor and weight", "anchor", "weight", "neither")


def covering(**choices: tuple) -> list[Any]:
    """Cases in which every two choices come together for many rows, and every choice comes with few of them.

    Each is the best of those that were drawn.
    """
    draw = random.Random(0)

    def met(case: dict[str, Any]) -> set:
        pairs = combinations(sorted(case.items()), 2)
        return {pair for pair in pairs if case["rows"] == MANY or "rows" in dict(pair)}

    missing = {
        pair
        for a, b in combinations(sorted(choices), 2)
        for pair in product([(a, choice) for choice in choices[a]], [(b, choice) for choice in choices[b]])
    }
    cases = []
    while missing:
        needed = {"rows": MANY} | dict(min(missing, key=repr))
        drawn = [{name: draw.choice(some) for name, some in choices.items()} | needed for _ in range(60)]
        cases.append(max(drawn, key=lambda case: len(missing & met(case))))
        missing -= met(cases[-1])
    return [pytest.param(case, id=str([*case.values()]).replace("torch.", "")) for case in cases]


def companions(hidden: Tensor, k: int, given: str = "neither", strided: bool = False) -> list[Tensor | None]:
    """Unit directions, anchors, and weights of which some are 0; anchors of their rows are NaN.

    ``strided``: every other number in memory belongs to something else.
    """
    make = torch.Generator().manual_seed(k)
    rows, size = hidden.shape
    direction = torch.nn.functional.normalize(torch.randn(k, size, generator=make), dim=-1)
    anchor = hidden.float().cpu() @ direction.T + torch.randn(rows, k, generator=make)
    weight = torch.rand(rows, generator=make) * (torch.rand(rows, generator=make) < 0.6)
    if "weight" in given:
        anchor[weight == 0] = float("nan")
    if strided:
        anchor, weight = (torch.stack([t, torch.full_like(t, 7)], -1)[..., 0] for t in (anchor, weight))
    placed = [direction.to("cuda")]
    return [*placed, *(t.to("cuda") if name in given else None for name, t in (("anchor", anchor), ("weight", weight)))]


def states(rows: int, size: int, dtype: torch.dtype, strided: bool = False, seed: int = 0) -> Tensor:
    """``[rows, size]`` with a few large channels; ``strided``: each row is followed by numbers that are not its own."""
    hidden = torch.randn(rows, size, generator=torch.Generator().manual_seed(size + seed))
    hidden[:, :: max(1, size // 3)] *= 20
    hidden = hidden.to(dtype).to("cuda")
    return torch.cat([hidden, torch.full_like(hidden, 7)], 1)[:, :size] if strided else hidden


def half(dtype: torch.dtype) -> float:
    """Of a result, the share that one rounding to ``dtype`` may take or add."""
    return torch.finfo(dtype).eps / 2


def smallest(dtype: torch.dtype) -> float:
    """Half the distance between the smallest numbers of ``dtype``: what a rounding may be off next to 0."""
    return torch.finfo(dtype).smallest_normal * half(dtype)


def assert_near(result: Tensor, exact: Tensor, allowed: Tensor, name: str) -> None:
    off = (result.double().cpu() - exact).abs() - allowed
    assert not result.isnan().any(), name
    assert (off <= 0).all(), f"{name}: off by {off.max():.3g} more than allowed"


def ruled(direction: Tensor, kind: str, rounding: float) -> tuple[str, Tensor | None]:
    """What the launchers take of a rule."""
    return kind, rounding * direction.norm(dim=1) if rounding else None


def assert_penalty(found: tuple[Tensor, Tensor], oracle, hidden: Tensor, rest: list, rule: tuple) -> None:
    """Penalty and coefficient of each token; of a row of weight 0 they are 0, whatever it holds."""
    kind, rounding = rule
    direction, anchor, weight = rest
    expected = oracle(hidden, direction, anchor, weight, kind, rounding)
    live = torch.ones(len(hidden), dtype=torch.bool) if weight is None else weight.cpu() != 0
    tokens, coefficient = (part.cpu()[live] for part in found)
    for part in found:
        assert (part.cpu()[~live] == 0).all()
    z, scale, exact, slope = (part[live] for part in expected[:4])
    e = z if anchor is None else z - anchor.cpu()[live]
    w = torch.ones(len(z), 1) if weight is None else weight.cpu()[live].unsqueeze(1)
    h, r = hidden.double().cpu()[live], direction.double().cpu()
    # How much the slope moves with e, which is off by the sum and one more rounding.
    reach = rounding * h.norm(dim=1)[:, None] * r.norm(dim=1)
    steepest = {"squared": 2.0, "absolute": 1 / reach if rounding else 0.0}[kind]
    off = SUM * (scale + e.abs())
    assert_near(coefficient, slope, w * steepest * off + SUM * slope.abs(), "coefficient")
    # Three times: what "absolute" takes away is a third of what is left, or less.
    slack = (slope.abs() * off + w * steepest * off**2).sum(1) + 3 * SUM * exact
    assert_near(tokens, exact, slack, "penalty")


@pytest.mark.parametrize("case", covering(**SHAPES, strided=(False, True)))
def test_projection(oracle, case):
    hidden = states(case["rows"], case["size"], case["dtype"], case["strided"])
    direction, *_ = companions(hidden, case["k"])
    expected = oracle(hidden, direction, None, None)
    assert_near(project(hidden, direction), expected.projection, SUM * expected.scale, "projection")


@pytest.mark.parametrize(
    "case",
    covering(
        **SHAPES,
        penalty=PENALTIES,
        given=COMPANIONS,
        strided=(False, True),
    ),
)
def test_penalty(oracle, case):
    hidden = states(case["rows"], case["size"], case["dtype"], case["strided"])
    rest = companions(hidden, case["k"], case["given"], case["strided"])
    if rest[2] is not None:
        hidden[rest[2] == 0] = float("nan")
    assert_penalty(penalize(hidden, *rest, *ruled(rest[0], *case["penalty"])), oracle, hidden, rest, case["penalty"])


@pytest.mark.parametrize(
    "case",
    covering(
        **SHAPES,
        incoming=("none", "dense", "strided"),
        upstream=("none", "scalar", "per token"),
    ),
)
def test_gradient_of_the_penalty(case):
    make = torch.Generator().manual_seed(1)
    rows, size, dtype, k = (case[name] for name in ("rows", "size", "dtype", "k"))
    incoming = None if case["incoming"] == "none" else states(rows, size, dtype, case["incoming"] == "strided")
    direction, coefficient = (torch.randn(*shape, generator=make).to("cuda") for shape in ((k, size), (rows, k)))
    coefficient[::3] = 0
    coefficient[1::3, -1] = 0
    upstream = {"none": None, "scalar": torch.tensor(0.37), "per token": torch.randn(rows, generator=make)}[
        case["upstream"]
    ]
    upstream = None if upstream is None else upstream.to("cuda")

    found = accumulate_gradient(incoming, upstream, coefficient, direction, dtype)

    factor = torch.ones(1) if upstream is None else upstream.double().cpu().reshape(-1, 1)
    terms = (factor * coefficient.double().cpu()).unsqueeze(2) * direction.double().cpu()
    base = torch.zeros(rows, size).double() if incoming is None else incoming.double().cpu()
    exact = base + terms.sum(1)
    allowed = half(dtype) * exact.abs() + smallest(dtype) + SUM * (base.abs() + terms.abs().sum(1))
    assert found.dtype == dtype
    assert_near(found, exact, allowed, "gradient")


@pytest.mark.parametrize(
    "case",
    covering(
        rows=ROWS,
        size=SIZES,
        dtypes=NORM_DTYPES,
        rule=RULES,
        k=(0, 1, 3, 8),
        penalty=PENALTIES,
        given=COMPANIONS,
        strided=(False, True),
    ),
)
def test_norm(oracle, case):
    dtype, weight_dtype = case["dtypes"]
    casting, offset = case["rule"]
    hidden = states(case["rows"], case["size"], dtype, case["strided"])
    v = states(1, case["size"], weight_dtype, seed=1)[0]
    rest, rule = [None, None, None], ("squared",)
    if case["k"]:
        rest = companions(hidden, case["k"], case["given"], case["strided"])
        rule = ruled(rest[0], *case["penalty"])
    normed, inverse_rms, tokens, coefficient = rms_norm_penalize(hidden, v, EPS, casting, offset, *rest, *rule)

    h = hidden.double().cpu()
    s = (h.square().mean(-1, keepdim=True) + EPS).rsqrt()
    assert_near(inverse_rms, s.squeeze(-1), SUM * s.squeeze(-1), "inverse RMS")
    factor = (v.double().cpu() + offset).abs()
    exact = h * s * (v.double().cpu() + offset)
    share, least = SUM + half(normed.dtype), smallest(normed.dtype)
    if casting == "llama":  # rounds n to the dtype of h too
        share, least = share + half(dtype), least + smallest(dtype) * factor
    assert normed.dtype == (dtype if casting == "gemma" else torch.promote_types(dtype, weight_dtype))
    assert_near(normed, exact, 1.01 * share * exact.abs() + least, "normed states")
    if dtype.itemsize == 2:
        # Rounded where the rule says: what is off by a unit elsewhere is off here in one of many thousands.
        n = (h * s).to(dtype).double() if casting == "llama" else h * s
        rounded = (n * (v.double().cpu() + offset)).to(normed.dtype)
        equal = (normed.cpu() - rounded).abs() <= SUM / 4 * rounded.abs()
        assert equal.double().mean() > 0.97
    if case["k"]:
        assert_penalty((tokens, coefficient), oracle, hidden, rest, case["penalty"])
    else:
        assert tokens.numel() == coefficient.numel() == 0


@pytest.mark.parametrize(
    "case",
    covering(
        rows=ROWS,
        size=SIZES,
        dtypes=NORM_DTYPES,
        offset=(0.0, 1.0),
        k=(0, 1, 3, 8),
        upstream=("none", "scalar"),
        needs_weight=(False, True),
        strided=(False, True),
    ),
)
def test_gradient_of_the_norm(case):
    rows, size, k, offset = (case[name] for name in ("rows", "size", "k", "offset"))
    dtype, weight_dtype = case["dtypes"]
    make = torch.Generator().manual_seed(1)
    hidden = states(rows, size, dtype, case["strided"])
    # One of the two is strided: neither's rows are where the other's are.
    incoming = states(rows, size, torch.promote_types(dtype, weight_dtype), not case["strided"], seed=1)
    v = states(1, size, weight_dtype, seed=2)[0]
    inverse_rms = (hidden.float().square().mean(-1) + EPS).rsqrt()
    coefficient = torch.randn(rows, k, generator=make).to("cuda")
    direction = torch.randn(k, size, generator=make).to("cuda") if k else None
    upstream = torch.tensor(0.37).to("cuda") if k and case["upstream"] == "scalar" else None
    options = (offset, case["needs_weight"])

    gradient, for_weight = rms_norm_gradient(
        incoming, upstream, hidden, v, inverse_rms, coefficient, direction, *options
    )

    g, h, s = incoming.double().cpu(), hidden.double().cpu(), inverse_rms.double().cpu()[:, None]
    n, m = h * s, g * (v.double().cpu() + offset)
    exact = s * (m - n * (m * n).mean(-1, keepdim=True))
    terms = s * (m.abs() + n.abs() * (m * n).abs().mean(-1, keepdim=True))
    if upstream is not None:
        c, r = upstream.double().cpu() * coefficient.double().cpu(), direction.double().cpu()
        exact, terms = exact + c @ r, terms + c.abs() @ r.abs()
    assert gradient.dtype == dtype
    assert_near(gradient, exact, half(dtype) * exact.abs() + smallest(dtype) + SUM * terms, "gradient")
    if case["needs_weight"]:
        exact, terms = (g * n).sum(0), (g * n).abs().sum(0)
        assert for_weight.dtype == weight_dtype
        allowed = half(weight_dtype) * exact.abs() + smallest(weight_dtype) + SUM * terms
        assert_near(for_weight, exact, allowed, "weight's gradient")
    else:
        assert for_weight.numel() == 0


@pytest.mark.parametrize("penalty", PENALTIES)
def test_a_row_of_weight_0_may_hold_anything(penalty):
    hidden, v = states(MANY, 40, torch.float32), states(1, 40, torch.float32, seed=1)[0]
    direction, anchor, weight = companions(hidden, 3, "anchor and weight")
    hidden[weight == 0] = float("nan")
    rest = (direction, anchor, weight, *ruled(direction, *penalty))
    _, _, tokens, coefficient = rms_norm_penalize(hidden, v, EPS, "llama", 0.0, *rest)
    dead = (weight == 0).cpu()
    assert dead.any()
    for part in (tokens.cpu(), coefficient.cpu()):
        assert (part[dead] == 0).all()
        assert part[~dead].isfinite().all()


@pytest.mark.parametrize("rows", [300, 2100], ids=["one program", "two"])
def test_the_weights_gradient_of_many_rows(rows):
    """More than are added up at a time, and so many that programs share the rows."""
    size, target = 40, launch.Target("sm_90", 32, 2)
    tile = launch.sum_tile(size, target)
    assert rows > tile.rows
    assert launch.sum_splits(rows, size, tile, target) == (1 if rows == 300 else 2)
    hidden, incoming = (states(rows, size, torch.float32, seed=seed) for seed in range(2))
    inverse_rms, v = torch.ones(rows).to("cuda"), torch.ones(size).to("cuda")
    found = torch.empty_like(v)
    rms_norm_penalty.sum_for_weight(incoming, hidden, inverse_rms, None, found)
    terms = incoming.double().cpu() * hidden.double().cpu()
    assert_near(found, terms.sum(0), SUM * terms.abs().sum(0), "weight's gradient")


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_rows(dtype):
    hidden, v = states(0, 40, dtype), states(1, 40, dtype)[0]
    rest = companions(hidden, 3, "anchor and weight")
    found = rms_norm_penalize(hidden, v, EPS, "llama", 0.0, *rest, "squared")
    normed, inverse_rms, _, coefficient = found
    assert [tuple(part.shape) for part in found] == [(0, 40), (0,), (0,), (0, 3)]
    upstream = torch.ones(()).to("cuda")
    saved = (inverse_rms, coefficient, rest[0])
    gradient, for_weight = rms_norm_gradient(normed, upstream, hidden, v, *saved, 0.0, True)
    assert gradient.shape == (0, 40)
    assert (for_weight == 0).all()
    assert project(hidden, rest[0]).shape == (0, 3)
    assert [tuple(part.shape) for part in penalize(hidden, *rest, "squared")] == [(0,), (0, 3)]
    assert accumulate_gradient(normed, upstream, coefficient, rest[0], dtype).shape == (0, 40)
