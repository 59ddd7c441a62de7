"""Strength that sets itself: the controller, against simulated models that answer at once, late, weakly or strongly."""

import json
import math

import pytest
import torch

from procon.errors import ProConError
from procon.schedule import AlphaSchedule
from procon.training import Hold

BUDGET = 0.05


def controller(alpha: float = 0.2, budget: float = BUDGET) -> Hold:
    hold = Hold(AlphaSchedule.holding(budget))
    hold.alpha = torch.tensor(alpha)
    return hold


def trace(hold: Hold, plant, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Alpha and true shift of each step; ``plant(shift, alpha, step)`` gives the shift, measured with noise of 15%."""
    generator, shift, alphas, shifts = torch.Generator().manual_seed(0), 0.0, [], []
    for step in range(steps):
        alpha = hold.alpha.item()
        shift = plant(shift, alpha, step)
        hold.step(torch.tensor(shift * math.exp(0.15 * torch.randn((), generator=generator).item())))
        alphas.append(alpha)
        shifts.append(shift)
    return torch.tensor(alphas), torch.tensor(shifts)


def delayed(scale: float, delay: float, power: float = 1.0):
    """Goes to ``scale / alpha ** power``, as 1 - exp(-t / delay)."""
    return lambda shift, alpha, step: shift + (scale / alpha**power - shift) / delay


#: Answers at once, or late, as strongly as alpha, less, or more, and one whose task pulls more and more.
PLANTS = {
    "at once": delayed(0.05, 1),
    "weakly": delayed(0.05, 1, 0.5),
    "after 10 steps": delayed(0.05, 10),
    "after 30 steps": delayed(0.05, 30),
    "after 30 steps, strongly": delayed(0.05, 30, 2),
    "after 30 steps, weakly": delayed(0.05, 30, 0.5),
    "pulls more": lambda shift, alpha, step: delayed(0.02 * (1 + step / 100), 20)(shift, alpha, step),
}


@pytest.mark.parametrize("start", [0.02, 0.2, 2.0])
@pytest.mark.parametrize("plant", PLANTS.values(), ids=PLANTS)
def test_the_shift_converges_to_the_budget(plant, start):
    alphas, shifts = trace(controller(start), plant, 600)
    settled = shifts[400:] / BUDGET
    assert settled.min() > 0.75
    assert settled.max() < 1.25
    assert settled.mean() == pytest.approx(1, abs=0.1)
    assert alphas.min() >= 2e-4
    assert alphas.max() <= 200


def test_it_overshoots_less_than_ascent_alone(monkeypatch):
    def swings() -> float:
        _, shifts = trace(controller(0.2), PLANTS["after 30 steps"], 300)
        return shifts.max().item() / BUDGET

    damped = swings()
    monkeypatch.setattr("procon.training.hold._DAMPING", 0.0)
    assert damped < 0.8 * swings()


@pytest.mark.parametrize(("shift", "bound"), [(10.0, 200.0), (0.0, 2e-4)])
def test_alpha_is_bounded_and_leaves_its_bound(shift, bound):
    hold = controller()
    alphas, _ = trace(hold, lambda *_: shift, 300)
    assert alphas[-1] == pytest.approx(bound)
    ratio = alphas[1:] / alphas[:-1]
    # An error of one at most, that changes by two at most.
    assert ratio.max() <= math.exp(0.1 + 2) * 1.001
    trace(hold, lambda *_: BUDGET**2 / shift if shift else 10.0, 40)
    assert abs(math.log(hold.alpha.item() / bound)) > 0.1


def test_a_step_is_the_formula():
    hold = controller(0.3)
    average, alpha, before = 0.0, 0.3, -1.0
    for measured in (0.01, 0.2, 3.0, 0.0, 0.04):
        hold.measure(torch.tensor(measured / 4, dtype=torch.float64))
        hold.measure(torch.tensor(3 * measured / 4, requires_grad=True))
        assert hold.due
        hold.step(hold.measured)
        average += 0.2 * (measured - average)
        error = max(-1, min(1, average / BUDGET - 1))
        alpha *= math.exp(0.1 * error + (error - before))
        before = error
        assert (hold.average.item(), hold.alpha.item()) == pytest.approx((average, alpha), rel=1e-5)
        assert not hold.due
        assert hold.measured == 0
        assert not hold.alpha.requires_grad
        assert hold.alpha.dtype == torch.float32


@pytest.mark.parametrize("measured", [math.nan, math.inf])
def test_what_is_not_finite_is_left_out(measured):
    hold = controller()
    hold.step(torch.tensor(0.07))
    average = hold.average.item()
    hold.step(torch.tensor(measured))
    assert hold.average.item() == average
    assert math.isfinite(hold.alpha.item())


def test_its_state_is_exact_through_json():
    one, other = controller(), controller()
    for measured in (0.013, 0.4, 0.07):
        one.step(torch.tensor(measured))
    other.restore(json.loads(json.dumps(one.state())))
    for hold in (one, other):
        hold.step(torch.tensor(0.11))
    assert torch.equal(one.alpha, other.alpha)
    assert torch.equal(one.average, other.average)
    other.restore(None)
    assert other.state() == Hold(AlphaSchedule.holding(BUDGET)).state()


@pytest.mark.parametrize(
    ("average", "alpha", "words"),
    [
        (
            0.056,
            200.0,
            "is 0.056 of the gap at the end, the budget 0.05, with alpha at 200, its upper bound",
        ),
        (0.056, 1.0, "with alpha at 1, not yet at its bound"),
        (0.054, 200.0, None),
        (0.001, 2e-4, None),
    ],
)
def test_a_budget_that_is_not_held_is_warned_of(average, alpha, words, caplog):
    hold = controller()
    hold.restore({"alpha": alpha, "average": average})
    hold.warn()
    assert hold.did()["held"] is (words is None)
    assert (words or "") in caplog.text
    assert bool(caplog.text) is (words is not None)


def test_phases_set_nothing():
    with pytest.raises(ProConError, match=r"schedule '0.2' is one of phases, which sets nothing: give 'hold'"):
        Hold(AlphaSchedule.constant())
