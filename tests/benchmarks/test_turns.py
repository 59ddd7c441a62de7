"""Trainers that take turns train as they would alone."""

from contextlib import ExitStack

import pytest
import torch

from benchmarks.harness.turns import Turns


def weights(trainer) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


def test_two_in_turns_train_as_each_alone(make_trainer):
    alone = []
    for schedule in (None, "procon_s:1"):
        trainer = make_trainer("Trainer", schedule, folder=f"alone-{schedule}", save_strategy="no")
        trainer.train()
        alone.append(weights(trainer))
    with ExitStack() as stack:
        trainers = [make_trainer("Trainer", s, folder=f"turns-{s}", save_strategy="no") for s in (None, "procon_s:1")]
        turns = [stack.enter_context(Turns(trainer, 2)) for trainer in trainers]
        assert [trainer.state.global_step for trainer in trainers] == [0, 0]
        turns[1]()
        assert [trainer.state.global_step for trainer in trainers] == [0, 2]
        turns[0]()
        assert [trainer.state.global_step for trainer in trainers] == [2, 2]
        for turn in turns:
            turn()
    assert [trainer.state.global_step for trainer in trainers] == [4, 4]
    for trainer, expected in zip(trainers, alone, strict=True):
        assert torch.equal(weights(trainer), expected)


def test_what_fails_in_a_turn_is_raised_by_it(make_trainer, monkeypatch):
    trainer = make_trainer("Trainer", None, save_strategy="no")
    with Turns(trainer, 1) as turn:
        turn()
        monkeypatch.setattr(trainer, "training_step", lambda *_args, **_kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            turn()
