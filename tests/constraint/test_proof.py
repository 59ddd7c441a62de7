"""Does the constraint act? What stops a training that would go on without it, or without numbers."""

import logging
import re

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from procon.constraint import ProjectionConstraint, constrained_tokens
from procon.constraint.proof import check_finite, reaches_a_parameter, refuse_data_parallel
from procon.constraint.target import Target, on_device
from procon.errors import ProConError
from procon.ops import constrain, rms_norm_constrain


def test_data_parallel_is_refused():
    for gpus in (0, 1):
        refuse_data_parallel(gpus)
    with pytest.raises(ProConError, match=r"^nn\.DataParallel copies the model without its hooks: start one process"):
        refuse_data_parallel(2)


@pytest.mark.parametrize("penalty", ["nan", "inf"])
def test_a_penalty_that_is_no_number_stops_the_training(penalty):
    with pytest.raises(ProConError, match=f"^the penalty became {penalty} by step 7, so hidden states are NaN or inf"):
        check_finite(float(penalty), 7)
    check_finite(1e308, 7)


class TestReach:
    """From the graph alone: does backward from a penalty arrive at a parameter?"""

    @pytest.fixture
    def direction(self) -> torch.Tensor:
        return torch.ones(4)

    def penalties(self, hidden: torch.Tensor, direction: torch.Tensor) -> list[torch.Tensor]:
        _, plain = constrain(hidden, direction)
        _, within = rms_norm_constrain(hidden, nn.Parameter(torch.ones(4)), 1e-6, direction)
        return [plain, within]

    def test_a_parameter_below(self, direction):
        for penalty in self.penalties(nn.Linear(4, 4)(torch.randn(3, 4)).tanh(), direction):
            assert reaches_a_parameter([penalty])

    def test_the_norms_own_weight_gets_nothing_of_it(self, direction):
        hidden = torch.randn(3, 4, requires_grad=True)  # and is no parameter
        for penalty in self.penalties(hidden.exp(), direction):
            assert penalty.requires_grad
            assert not reaches_a_parameter([penalty])
        assert not reaches_a_parameter([])
        assert not reaches_a_parameter([torch.zeros(())])

    def test_one_of_many_is_enough(self, direction):
        leaf = torch.randn(3, 4, requires_grad=True)
        dead = self.penalties(leaf, direction) + self.penalties(leaf.sin(), direction)
        alive = self.penalties(nn.Embedding(5, 4)(torch.tensor([1, 2, 3])), direction)
        assert not reaches_a_parameter(dead)
        for one in alive:
            assert reaches_a_parameter([*dead, one])
            assert reaches_a_parameter([one, *dead])

    def test_through_another_penalty(self, direction):
        hidden, _ = constrain(nn.Linear(4, 4)(torch.randn(3, 4)), direction)
        hidden, _ = rms_norm_constrain(hidden, torch.ones(4), 1e-6, direction)
        assert all(reaches_a_parameter([penalty]) for penalty in self.penalties(hidden, direction))

    def test_what_another_node_hides_counts(self, direction):
        layer = nn.Linear(4, 4)
        hidden = checkpoint(layer, torch.randn(3, 4, requires_grad=True), use_reentrant=True)
        assert all(reaches_a_parameter([penalty]) for penalty in self.penalties(hidden, direction))

    def test_a_frozen_model(self, direction):
        layer = nn.Linear(4, 4).requires_grad_(False)
        hidden = layer(torch.randn(3, 4, requires_grad=True))
        assert not any(reaches_a_parameter([penalty]) for penalty in self.penalties(hidden, direction))


#: What a training without the constraint is told.
LOST = "no penalty went through backward, so nothing was constrained: call set_target(anchors, mask) before each"


@pytest.fixture
def constraint(tiny_model, random_directions):
    """Attached to a tiny model; the model, and a batch."""
    model = tiny_model()
    made = ProjectionConstraint(random_directions(model), penalty="squared")
    return made.attach(model), model, {"input_ids": torch.arange(10).view(2, 5)}


def step(made: ProjectionConstraint, model, batch) -> None:
    made.set_target(torch.zeros(2, 5, len(made.blocks)), torch.ones(2, 5))
    model(**batch)


def test_a_penalty_that_is_never_asked_for_stops_the_loop(constraint):
    made, model, batch = constraint

    def loop() -> None:
        with made:
            step(made, model, batch)
            step(made, model, batch)

    with pytest.raises(ProConError, match=re.escape(LOST)):
        loop()
    assert made.fused == ()


def test_another_error_is_not_hidden_by_it(constraint):
    made, model, batch = constraint

    def loop() -> None:
        with made:
            step(made, model, batch)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loop()


@pytest.mark.parametrize("asked", [True, False])
def test_a_penalty_that_is_in_no_loss_is_warned_of(constraint, caplog, asked):
    made, model, batch = constraint
    step(made, model, batch)
    if asked:
        made.penalty()
    with caplog.at_level(logging.WARNING):
        made.detach()
    assert LOST in caplog.text
    caplog.clear()
    made.detach()  # once is enough
    assert not caplog.text


def test_a_penalty_in_the_loss_is_not(constraint, caplog):
    made, model, batch = constraint
    with caplog.at_level(logging.WARNING), made:
        step(made, model, batch)
        made.penalty().backward()
        made.release()
        with torch.no_grad():
            step(made, model, batch)
            made.penalty()
    assert not caplog.text


def test_measuring_alone_is_no_training(constraint, caplog):
    made, model, batch = constraint
    with caplog.at_level(logging.WARNING), made, torch.no_grad():
        step(made, model, batch)
        made.penalty()
    assert not caplog.text


def test_training_beside_an_attached_constraint_is_said(constraint, caplog):
    made, model, batch = constraint
    made.enabled = False
    model.train()(**batch)
    with caplog.at_level(logging.WARNING):
        made.detach()
    assert LOST in caplog.text


def test_blocks_that_act(constraint):
    made, model, _ = constraint
    assert made.acting == made.fused == made.blocks == (0, 1, 2)
    model.requires_grad_(False)
    model.model.layers[1].requires_grad_()
    assert made.acting == (2,)
    made.detach()
    assert made.acting == made.fused == ()


def test_constrained_tokens_of_a_step():
    masks = [torch.tensor([[1.0, 0.0, 0.5]]), torch.tensor([[0.0, 0.25]])]
    batches = [{"constraint_mask": mask} for mask in masks]
    assert constrained_tokens(batches).item() == 1.75
    assert constrained_tokens(batches[1:]).item() == 0.25
    assert constrained_tokens(batches, lambda tokens: 4 * tokens).item() == 7
    assert constrained_tokens([]).item() == 1
    assert constrained_tokens([{"constraint_mask": torch.zeros(2, 2)}]).item() == 1
    with pytest.raises(ProConError, match=r"^the batch has no anchors: make batches with an AnchoredCollator"):
        constrained_tokens([*batches, {"input_ids": masks[0]}])


def test_what_blocks_need_is_moved_once_to_each_device():
    elsewhere, anchors, mask = torch.device("meta"), torch.ones(1, 2, 3, 1), torch.ones(2, 3)
    target = Target(anchors, mask, 0)
    moved = target.on(elsewhere, "eager")
    assert [tensor.device.type for tensor in (*moved.anchors, moved.mask)] == ["meta", "meta"]
    assert [tensor.shape for tensor in (*moved.anchors, moved.mask)] == [(6, 1), (6,)]
    assert target.on(elsewhere, "eager") is moved
    assert target.on(anchors.device, "eager").mask.data_ptr() == mask.data_ptr()
    copies = {mask.device: mask}
    assert on_device(copies, elsewhere).device == elsewhere
    assert on_device(copies, elsewhere) is copies[elsewhere]
    assert on_device(copies, mask.device) is mask
