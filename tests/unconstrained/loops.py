"""Loops of one's own: around a constrained forward, and around the constraint itself."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from setting import ALPHA, VOCABULARY, Outcome, against_plain, directions, model, refused, rows, scenario, tokenizer
from torch import nn
from torch.utils.data import DataLoader

from procon import AnchoredCollator, Anchors, ProCon, ProConSettings, ProjectionConstraint
from procon.data import padding_collator
from procon.integrations import ConstrainedForward


def batches(start: nn.Module, folder: Path, *, scope: str = "response", anchored: bool = False) -> tuple[list, Anchors]:
    pad = padding_collator(tokenizer())
    anchors = Anchors.record(
        start, DataLoader(rows(), 2, collate_fn=pad), directions(), folder / "anchors", scope=scope, progress=False
    )
    return list(DataLoader(rows(), 2, collate_fn=AnchoredCollator(pad, anchors) if anchored else pad)), anchors


# Around a constrained forward


def method(start: nn.Module, folder: Path, alpha: float | str) -> ProCon:
    """Training tokens alone: probes would act where these do not."""
    settings = ProConSettings(schedule=str(alpha), penalty="squared", scope="response", probes="none")
    return ProCon(start, settings=settings, directions=directions(), folder=folder, progress=False)


def forward_loop(
    step: Callable[[nn.Module, dict], torch.Tensor | None], *, prepare: Callable[[nn.Module], object] = lambda _: None
) -> Callable[[Path], Outcome]:
    """Two epochs of ``step``, which gives the loss that goes through backward."""

    def trained(folder: Path, alpha: float | str) -> nn.Module:
        start = model().train()
        loader = DataLoader(rows(), 2, collate_fn=padding_collator(tokenizer()))
        found = list(loader)
        procon = method(start, folder, alpha)
        procon.prepare(loader)
        prepare(start)
        optimizer = torch.optim.SGD(start.parameters(), lr=0.1)
        with ConstrainedForward(procon) if procon.active else nullcontext():
            for batch in found * 2:
                loss = step(start, dict(batch))
                if loss is not None:
                    loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        return start

    return lambda folder: against_plain(trained, folder)


def from_logits(start: nn.Module, batch: dict) -> torch.Tensor:
    return nn.functional.cross_entropy(start(**batch).logits.flatten(0, 1), batch["labels"].flatten().clamp_min(0))


def without_labels(start: nn.Module, batch: dict) -> torch.Tensor:
    labels = batch.pop("labels")
    return nn.functional.cross_entropy(start(**batch).logits.flatten(0, 1), labels.flatten().clamp_min(0))


def in_eval_mode(start: nn.Module, batch: dict) -> torch.Tensor:
    return start.eval()(**batch).loss


def of_a_copy(start: nn.Module, batch: dict) -> torch.Tensor:
    other = copy.deepcopy(model()).train()
    loss = other(**batch).loss
    for own, theirs in zip(start.parameters(), torch.autograd.grad(loss, list(other.parameters())), strict=True):
        own.grad = theirs
    return None


def times_zero(start: nn.Module, batch: dict) -> torch.Tensor:
    outputs = start(**batch)
    return 0 * outputs.loss + outputs.logits.square().mean()


def with_no_grad(start: nn.Module, batch: dict) -> None:
    with torch.no_grad():
        start(**batch)


def freeze_but_head(start: nn.Module) -> None:
    for name, parameter in start.named_parameters():
        parameter.requires_grad_("lm_head" in name)


scenario("as it is meant", "ConstrainedForward")(forward_loop(lambda start, batch: start(**batch).loss))
scenario("a loss from logits", "ConstrainedForward", short=True)(forward_loop(from_logits))
scenario("a loss without labels", "ConstrainedForward")(forward_loop(without_labels))
scenario("eval mode", "ConstrainedForward", short=True)(forward_loop(in_eval_mode))
scenario("a copy of the model trains", "ConstrainedForward")(forward_loop(of_a_copy))
scenario("the loss times 0", "ConstrainedForward")(forward_loop(times_zero))
scenario("no gradients", "ConstrainedForward")(forward_loop(with_no_grad))
scenario("no forward at all", "ConstrainedForward")(forward_loop(lambda start, batch: None))
scenario("only the head trains", "ConstrainedForward")(
    forward_loop(lambda start, batch: start(**batch).loss, prepare=freeze_but_head)
)


# Around the constraint itself


def bare_loop(
    step: Callable[[nn.Module, ProjectionConstraint, dict, float], torch.Tensor],
    *,
    prepare: Callable[[nn.Module], object] = lambda _: None,
    attach: Callable[[nn.Module, ProjectionConstraint], object] = lambda start, constraint: constraint.attach(start),
) -> Callable[[Path], Outcome]:
    """Two epochs of ``step``, which is given the constraint, a batch with anchors and alpha, and gives the loss."""

    def trained(folder: Path, alpha: float | str) -> nn.Module:
        start = model().train()
        found, _ = batches(start, folder, scope="all", anchored=True)
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


def as_meant(start, constraint, batch, alpha):
    target(constraint, batch)
    loss = start(**batch).loss + alpha * constraint.penalty()
    constraint.release()
    return loss


def never_asked(start, constraint, batch, alpha):
    target(constraint, batch)
    return start(**batch).loss


def asked_and_dropped(start, constraint, batch, alpha):
    target(constraint, batch)
    loss = start(**batch).loss
    constraint.penalty()
    constraint.release()
    return loss


def detached(start, constraint, batch, alpha):
    target(constraint, batch)
    loss = start(**batch).loss + alpha * constraint.penalty().detach()
    constraint.release()
    return loss


def as_a_number(start, constraint, batch, alpha):
    target(constraint, batch)
    loss = start(**batch).loss + alpha * constraint.penalty().item()
    constraint.release()
    return loss


def times_alpha_zero(start, constraint, batch, alpha):
    return as_meant(start, constraint, batch, 0.0)


def no_target(start, constraint, batch, alpha):
    return start(**drop_target(batch)).loss


def no_target_but_penalty(start, constraint, batch, alpha):
    return start(**drop_target(batch)).loss + alpha * constraint.penalty()


def before_the_forward(start, constraint, batch, alpha):
    target(constraint, batch)
    penalty = constraint.penalty()
    return start(**batch).loss + alpha * penalty


def disabled(start, constraint, batch, alpha):
    constraint.enabled = False
    target(constraint, batch)
    loss = start(**batch).loss
    constraint.release()
    return loss


def disabled_with_penalty(start, constraint, batch, alpha):
    constraint.enabled = False
    return as_meant(start, constraint, batch, alpha)


def of_another_model(start, constraint, batch, alpha):
    target(constraint, batch)
    loss = copy.deepcopy(model()).train()(**batch).loss
    return loss + alpha * constraint.penalty()


def two_forwards(start, constraint, batch, alpha):
    target(constraint, batch)
    loss = start(**batch).loss + start(**batch).loss
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


def empty_mask(start, constraint, batch, alpha):
    batch["constraint_mask"] = torch.zeros_like(batch["constraint_mask"])
    return as_meant(start, constraint, batch, alpha)


def padded_on(start, constraint, batch, alpha):
    batch["input_ids"] = torch.nn.functional.pad(batch["input_ids"], (0, 2))
    batch["labels"] = torch.nn.functional.pad(batch["labels"], (0, 2), value=-100)
    batch["attention_mask"] = torch.nn.functional.pad(batch["attention_mask"], (0, 2))
    return as_meant(start, constraint, batch, alpha)


def released_early(start, constraint, batch, alpha):
    target(constraint, batch)
    constraint.release()
    return start(**batch).loss


def compiled_before(start: nn.Module) -> None:
    start.forward = torch.compile(start.forward, backend="eager")
    start(input_ids=torch.randint(5, VOCABULARY, (2, 9)), labels=torch.randint(5, VOCABULARY, (2, 9)))


for _name, _step, _short in (
    ("as it is meant", as_meant, False),
    ("penalty() never asked for", never_asked, True),
    ("penalty() asked for and not added", asked_and_dropped, True),
    ("penalty().detach() added", detached, False),
    ("penalty().item() added", as_a_number, False),
    ("set_target forgotten", no_target, False),
    ("set_target forgotten, penalty() added", no_target_but_penalty, False),
    ("penalty() before the forward", before_the_forward, False),
    ("enabled left False", disabled, False),
    ("enabled left False, penalty() added", disabled_with_penalty, False),
    ("another model trains", of_another_model, False),
    ("two forwards for one target", two_forwards, False),
    ("the penalty of a forward without gradients", under_no_grad, False),
    ("the batch padded after its anchors were looked up", padded_on, False),
    ("released before the forward", released_early, False),
):
    scenario(_name, "bare loop", short=_short)(bare_loop(_step))

scenario("only the head trains", "bare loop")(bare_loop(as_meant, prepare=freeze_but_head))
scenario("compiled and traced before attach", "bare loop")(bare_loop(as_meant, prepare=compiled_before))
scenario("never attached", "bare loop")(bare_loop(as_meant, attach=lambda start, constraint: None))
scenario("attached to a copy", "bare loop")(
    bare_loop(as_meant, attach=lambda start, constraint: constraint.attach(copy.deepcopy(start)))
)


@scenario("a mask of zeros", "bare loop")
def no_tokens(folder: Path) -> Outcome:
    found = bare_loop(empty_mask)(folder)
    return Outcome("harmless", "no token is constrained") if found.outcome == "SILENT" else found


@scenario("anchors of another model, checked", "bare loop", short=True)
def other_anchors(folder: Path) -> Outcome:
    _, anchors = batches(model(), folder)
    other = model()
    nn.init.normal_(other.lm_head.weight)
    return refused(lambda: Anchors.record(other, [], directions(), anchors.path, progress=False))


@scenario("anchors of other data", "bare loop")
def other_data(folder: Path) -> Outcome:
    _, anchors = batches(model(), folder)
    collate = AnchoredCollator(padding_collator(tokenizer()), anchors)
    return refused(lambda: collate(rows(seed=2)))


@scenario("anchors of a model that trains along other directions", "bare loop")
def other_directions(folder: Path) -> Outcome:
    start = model()
    _, anchors = batches(start, folder)
    return refused(lambda: Anchors.record(start, [], directions(seed=1), anchors.path, progress=False))


@scenario("alpha that is not a strength", "ProCon")
def bad_alpha(folder: Path) -> Outcome:
    return refused(lambda: method(model(), folder, -ALPHA))
