"""A constraint that was attached and not used says so; what is counted and moved for it."""

import logging

import pytest
import torch

from procon.constraint import ProjectionConstraint, constrained_tokens
from procon.constraint.target import Target, on_device
from procon.constraint.use import Use
from procon.directions import Directions
from procon.errors import ProConError


@pytest.fixture
def constraint(tiny_model, random_directions):
    """``constraint(k)``: attached to a tiny model; the model, and a batch."""

    def make(k: int = 1):
        model = tiny_model()
        found = random_directions(model)
        draws = torch.randn(3, k - 1, 32, generator=torch.Generator().manual_seed(1))
        q = torch.linalg.qr(torch.cat([found.basis, draws], 1).mT).Q
        directions = Directions(q.mT.contiguous(), torch.ones(3, k))
        made = ProjectionConstraint(directions, penalty="squared")
        return made.attach(model), model, {"input_ids": torch.arange(10).view(2, 5)}

    return make


def step(made: ProjectionConstraint, model, batch, columns: int = 3) -> None:
    made.set_target(torch.zeros(2, 5, columns), torch.ones(2, 5))
    model(**batch)


def test_a_penalty_that_is_never_asked_for_stops_the_loop(constraint):
    made, model, batch = constraint()
    message = r"^set_target was called for 2 forwards with gradients, and penalty\(\) never, so nothing was constrained"

    def loop() -> None:
        with made:
            step(made, model, batch)
            step(made, model, batch)

    with pytest.raises(ProConError, match=message):
        loop()
    assert made.fused == ()


def test_another_error_is_not_hidden_by_it(constraint):
    made, model, batch = constraint()

    def loop() -> None:
        with made:
            step(made, model, batch)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loop()


@pytest.mark.parametrize("asked", [True, False])
def test_a_penalty_that_is_in_no_loss_is_warned_of(constraint, caplog, asked):
    made, model, batch = constraint()
    step(made, model, batch)
    if asked:
        made.penalty()
    with caplog.at_level(logging.WARNING):
        made.detach()
    says = r"penalty() was called 1 times, and none of them went" if asked else "set_target was called for 1 forwards"
    assert says in caplog.text
    caplog.clear()
    made.detach()  # once is enough
    assert not caplog.text


def test_a_penalty_in_the_loss_is_not(constraint, caplog):
    made, model, batch = constraint()
    with caplog.at_level(logging.WARNING), made:
        step(made, model, batch)
        made.penalty().backward()
        made.release()
        with torch.no_grad():
            step(made, model, batch)
            made.penalty()
    assert not caplog.text


def test_measuring_alone_is_no_training(constraint, caplog):
    made, model, batch = constraint()
    with caplog.at_level(logging.WARNING), made, torch.no_grad():
        step(made, model, batch)
        made.penalty()
    assert not caplog.text


def test_training_beside_an_attached_constraint_is_said():
    use = Use()
    use.trained = True
    assert "was trained while the constraint was attached, and never under it" in use.lost()


def test_what_is_said_of_a_use():
    use, penalty = Use(), torch.ones((), requires_grad=True) * 2
    assert use.lost() is None
    use.forwards = 3
    assert use.lost().startswith("set_target was called for 3 forwards with gradients, and penalty() never")
    use.asked = 2
    use.watch(torch.ones(()))
    use.watch(penalty)
    assert use.lost().startswith("penalty() was called 2 times, and none of them went through backward")
    penalty.backward()
    assert use.lost() is None


def test_blocks_that_act(constraint):
    made, model, _ = constraint()
    assert made.acting == made.fused == made.blocks == (0, 1, 2)
    model.requires_grad_(False)
    model.model.layers[1].requires_grad_()
    assert made.acting == (2,)
    made.detach()
    assert made.acting == made.fused == ()


def test_anchors_of_several_directions(constraint):
    made, model, batch = constraint(k=2)
    step(made, model, batch, columns=6)
    assert made.penalty() > 0
    made.penalty().backward()
    with pytest.raises(ProConError, match=r"^anchors have shape \(2, 5, 3\), expected \(2, 5, 6\): record them with"):
        step(made, model, batch, columns=3)


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
    target = Target(anchors, mask, "squared", "raw", 0)
    moved = target.on(elsewhere, "eager")
    assert [tensor.device.type for tensor in (*moved.anchors, moved.mask)] == ["meta", "meta"]
    assert [tensor.shape for tensor in (*moved.anchors, moved.mask)] == [(6,), (6,)]
    assert target.on(elsewhere, "eager") is moved
    assert target.on(anchors.device, "eager").mask.data_ptr() == mask.data_ptr()
    copies = {mask.device: mask}
    assert on_device(copies, elsewhere).device == elsewhere
    assert on_device(copies, elsewhere) is copies[elsewhere]
    assert on_device(copies, mask.device) is mask


def test_a_constraint_on_one_block(tiny_model, random_directions):
    model = tiny_model()
    made = ProjectionConstraint(random_directions(model), blocks=[1], penalty="squared").attach(model)
    step(made, model, {"input_ids": torch.arange(10).view(2, 5)}, columns=1)
    penalty = made.penalty()
    penalty.backward()
    assert penalty > 0
    assert made.acting == (1,)
    made.detach()


@pytest.mark.parametrize("setting", ["penalty", "sides", "units", "backend"])
def test_a_setting_that_is_none(tiny_model, random_directions, setting):
    with pytest.raises(ProConError, match=f"{setting} is 'usual': choose one of"):
        ProjectionConstraint(random_directions(tiny_model()), **{setting: "usual"})
