"""Full fine-tuning in the study: all weights are trained, in float32, and measured in the dtype of the start."""

from dataclasses import replace

import pytest
import torch

from benchmarks.study.budgets import PLAIN
from benchmarks.study.hard_parts import DEFAULT, full
from benchmarks.study.jobs import find_job
from benchmarks.study.plan import Size
from benchmarks.study.trial import fine_tune, make_trainer

SIZE = Size(train=16, test=1)


@pytest.mark.parametrize("method", [PLAIN, DEFAULT], ids=lambda method: method.name)
def test_all_weights_are_trained(tiny_start, method):
    start = replace(tiny_start, loading={"dtype": "bfloat16"})
    model, before = start.model(), start.model().state_dict()
    found = fine_tune(
        model, start.tokenizer, full(method), start.directions, find_job("arithmetic"), 0, SIZE, base=start.base
    )
    assert found["steps"] == 2
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    # Norms are ones, which steps so small leave at ones in bfloat16.
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if "norm" not in name}


def test_small_steps_are_not_rounded_away(tiny_start, tmp_path):
    start = replace(tiny_start, loading={"dtype": "bfloat16"})
    trainer = make_trainer(
        start.model(),
        start.tokenizer,
        full(PLAIN, 1e-6),
        start.directions,
        find_job("arithmetic"),
        0,
        SIZE,
        str(tmp_path / "out"),
        max_steps=1,
        warmup_steps=0,
        max_grad_norm=0,
    )
    assert {(parameter.dtype, parameter.requires_grad) for parameter in trainer.model.parameters()} == {
        (torch.float32, True)
    }
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    moved = [(value.detach() - before[name]).abs().max().item() for name, value in trainer.model.named_parameters()]
    assert min(moved) == pytest.approx(1e-6, rel=0.2)
