"""Loops of one's own around the constraint itself."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import torch
from setting import VOCABULARY, Outcome, against_plain, directions, model, rows, scenario, tokenizer
from torch import nn
from torch.utils.data import DataLoader

from procon import AnchoredCollator, Anchors, ProjectionConstraint
from procon.data import padding_collator


def batches(start: nn.Module, folder: Path) -> list[dict]:
    pad = padding_collator(tokenizer())
    loader = DataLoader(rows(), 2, collate_fn=pad)
    anchors = Anchors.record(start, loader, directions(), folder / "anchors", progress=False)
    return list(DataLoader(rows(), 2, collate_fn=AnchoredCollator(pad, anchors)))


def bare_loop(
    step: Callable[[nn.Module, ProjectionConstraint, dict, float], torch.Tensor],
    *,
    prepare: Callable[[nn.Module], object] = lambda _: None,
    attach: Callable[[nn.Module, ProjectionConstraint], object] = lambda start, constraint: constraint.attach(start),
) -> Callable[[Path], Outcome]:
    """Two epochs of ``step``, which is given the constraint, a batch with anchors and alpha, and gives the loss."""

    def trained(folder: Path, alpha: float | str) -> nn.Module:
        start = model().train()
        found = batches(start, folder)
        prepare(start)
        optimizer = torch.optim.SGD(start.parameters(), lr=0.1)
        constraint = ProjectionConstraint(directions(), penalty="squared")
        if alpha == "0":
            for batch in found * 2:
                plain = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
                start(**plain).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            return start
        attach(start, constraint)
        for batch in found * 2:
            step(start, constraint, dict(batch), float(alpha)).backward()
            optimizer.step()
            optimizer.zero_grad()
        constraint.detach()
        return start

    return lambda folder: against_plain(trained, folder)


def target(constraint: ProjectionConstraint, batch: dict) -> None:
    constraint.set_target(batch.pop("anchors"), batch.pop("constraint_mask"))


def drop_target(batch: dict) -> dict:
    return {name: value for name, value in batch.items() if name not in ("anchors", "constraint_mask")}


def adding(change: Callable[[torch.Tensor], torch.Tensor | float]) -> Callable:
    def step(start, constraint, batch, alpha):
        target(constraint, batch)
        loss = start(**batch).loss + alpha * change(constraint.penalty())
        constraint.release()
        return loss

    return step


as_meant = adding(lambda penalty: penalty)


def in_eval_mode(start, constraint, batch, alpha):
    return as_meant(start.eval(), constraint, batch, alpha)


def disabled(start, constraint, batch, alpha):
    constraint.enabled = False
    return as_meant(start, constraint, batch, alpha)


def of_another_model(start, constraint, batch, alpha):
    target(constraint, batch)
    loss = copy.deepcopy(model()).train()(**batch).loss
    return loss + alpha * constraint.penalty()


def under_no_grad(start, constraint, batch, alpha):
    anchors, mask = batch["anchors"], batch["constraint_mask"]
    batch = drop_target(batch)
    with torch.no_grad():
        constraint.set_target(anchors, mask)
        start(**batch)
        penalty = constraint.penalty()
        constraint.release()
    constraint.enabled = False
    loss = start(**batch).loss + alpha * penalty
    constraint.enabled = True
    return loss


def released_early(start, constraint, batch, alpha):
    target(constraint, batch)
    constraint.release()
    return start(**batch).loss


def compiled_before(start: nn.Module) -> None:
    start.forward = torch.compile(start.forward, backend="eager")
    start(input_ids=torch.randint(5, VOCABULARY, (2, 9)), labels=torch.randint(5, VOCABULARY, (2, 9)))


for _name, _step, _short in (
    ("as it is meant", as_meant, False),
    ("penalty() asked for and not added", adding(lambda penalty: 0.0), True),
    ("penalty().detach() added", adding(lambda penalty: penalty.detach()), False),
    ("penalty().item() added", adding(lambda penalty: penalty.item()), False),
    ("evaluation mode", in_eval_mode, True),
    ("enabled left False, penalty() added", disabled, False),
    ("another model trains", of_another_model, False),
    ("the penalty of a forward without gradients", under_no_grad, False),
    ("released before the forward", released_early, False),
):
    scenario(_name, "bare loop", short=_short)(bare_loop(_step))

scenario("compiled and traced before attach", "bare loop")(bare_loop(as_meant, prepare=compiled_before))
scenario("attached to a copy", "bare loop")(
    bare_loop(as_meant, attach=lambda start, constraint: constraint.attach(copy.deepcopy(start)))
)
