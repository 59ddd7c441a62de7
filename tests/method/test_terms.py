"""A term is a class and a line: three that are planted here train in every door, and nothing else is changed for it."""

import importlib.util
from pathlib import Path

import pytest
import torch

from procon.method import Term
from procon.method import procon as home

# Modules of tests are no packages: the doors are read from their file.
_spec = importlib.util.spec_from_file_location("doors", Path(__file__).with_name("test_doors.py"))
doors = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(doors)


class Share(Term):
    """One with a share of the loss: the mean square of an output layer."""

    name = "share"

    def share(self, step, run):
        weight = run.model.get_output_embeddings().weight
        return 100 * weight.float().square().mean() / step.parts


class Gradient(Term):
    """One that changes the step's gradient: that of the output layer is turned round."""

    name = "gradient"

    def before_optimizer(self, step, run):
        run.model.get_output_embeddings().weight.grad.neg_()


class Weights(Term):
    """One with a step of its own: after the optimiser's, the output layer shrinks. It counts its steps, and goes on."""

    name = "weights"

    def __init__(self) -> None:
        self.steps = 0

    def after_optimizer(self, step, run):
        self.steps += 1
        with torch.no_grad():
            run.model.get_output_embeddings().weight.mul_(1 - 0.01 * self.steps)

    def state(self):
        return {"steps": self.steps}

    def restore(self, state, folder, run):
        self.steps = state["steps"]


@pytest.fixture
def setting(tiny_model, tokenizer, samples, random_directions, tmp_path) -> doors.Setting:
    return doors.Setting(tiny_model, tokenizer, samples, random_directions(tiny_model()), tmp_path)


@pytest.mark.parametrize("door", [name for name in doors.DOORS if name not in ("ProConTrainer", "axolotl")])
def test_planted_terms_train_in_every_door(setting, door, monkeypatch):
    """All three at once; that each of them acts shows below."""
    made = home.make_terms
    monkeypatch.setattr(
        home, "make_terms", lambda settings, fuse="auto": [*made(settings, fuse), Share(), Gradient(), Weights()]
    )
    found = doors.DOORS[door](setting, False)
    assert doors.DOORS[door](setting, True) == pytest.approx(found[doors.MIDDLE :], abs=1e-7)
    assert found == pytest.approx(doors.reference(setting, "planted"), abs=1e-5)


@pytest.mark.parametrize("term", [Share, Gradient, Weights])
def test_each_planted_term_acts(setting, term, monkeypatch):
    plain = doors.reference(setting, "both")
    made = home.make_terms
    monkeypatch.setattr(home, "make_terms", lambda settings, fuse="auto": [*made(settings, fuse), term()])
    found = doors.reference(setting, term.name)
    assert max(abs(one - other) for one, other in zip(found, plain, strict=True)) > 1e-3
