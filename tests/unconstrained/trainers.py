"""Trainer classes, callbacks and models that might lose the constraint on the way from the penalty to the weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from schedules import by_callback
from setting import (
    BLOCKS,
    Outcome,
    against_plain,
    config,
    directions,
    lora,
    model,
    refused,
    rows,
    scenario,
    tokenizer,
    train,
    trainer,
)
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback

from procon import AnchoredCollator, Directions, ProConMixin, ProConTrainer
from procon.data import padding_collator
from procon.models import find_decoder


def compare(name: str, build: Callable[..., Any], *, short: bool = False, door: str = "ProConTrainer") -> None:
    """A scenario of ``build(folder, alpha)``, which makes a trainer."""
    scenario(name, door, short=short)(
        lambda folder: against_plain(lambda place, alpha: train(build(place, alpha)), folder)
    )


def own_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


# The order of classes


class OwnTrainer(Trainer):
    """Someone's trainer."""


@scenario("class T(MyTrainer, ProConMixin)", "ProConMixin", short=True)
def wrong_order(folder: Path) -> Outcome:
    def define() -> None:
        class Wrong(OwnTrainer, ProConMixin):
            pass

    return refused(define, "the class is a plain trainer")


@scenario("class T(MyTrainer, ProConMixin), built from a class of both", "ProConMixin")
def wrong_order_by_type(folder: Path) -> Outcome:
    return refused(lambda: type("Wrong", (Trainer, ProConMixin), {}), "the class is a plain trainer")


class AskedFirst(OwnTrainer, ProConTrainer):
    pass


class MixedIn(ProConMixin, OwnTrainer):
    pass


compare("class T(MyTrainer, ProConTrainer)", partial(trainer, kind=AskedFirst))
compare("class T(ProConMixin, MyTrainer)", partial(trainer, kind=MixedIn), door="ProConMixin")


# Losses of their own


def losing(change: Callable[..., torch.Tensor]) -> type:
    """A trainer whose loss is ``change(trainer, loss, outputs, labels)`` of ours."""

    class Changed(ProConTrainer):
        calls = 0

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs["labels"]
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            self.calls += 1
            loss = change(self, loss, outputs, labels)
            return (loss, outputs) if return_outputs else loss

    return Changed


def stepping(step: Callable[..., torch.Tensor]) -> type:
    """A trainer whose optimiser step takes the loss ``step(trainer, model, inputs, num_items_in_batch)``."""

    class Steps(ProConTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = step(self, model.train(), self._prepare_inputs(inputs), num_items_in_batch)
            self.accelerator.backward(loss)
            if self.procon.active:
                self.procon.release()
            return loss.detach()

    return Steps


def without_super(self, model, inputs, return_outputs=False, num_items_in_batch=None):
    labels = inputs["labels"]
    outputs = model(**{name: inputs[name] for name in ("input_ids", "attention_mask")})
    loss = own_loss(outputs.logits, labels)
    return (loss, outputs) if return_outputs else loss


def plain_step(self, model, inputs, number):
    return model(**{name: inputs[name] for name in ("input_ids", "attention_mask", "labels")}).loss


def step_that_drops(self, model, inputs, number):
    labels = inputs["labels"]
    return own_loss(self.compute_loss(model, inputs, True, number)[1].logits, labels)


def another_loader(self):
    return self.accelerator.prepare(DataLoader(self.train_dataset, batch_size=2, collate_fn=self.data_collator))


def loader_without_anchors(self):
    ProConTrainer.get_train_dataloader(self)
    return DataLoader(self.train_dataset, batch_size=2, collate_fn=AnchoredCollator(self.data_collator, None))


def removed(*names: str) -> Callable:
    def prepare_inputs(self, inputs):
        prepared = ProConTrainer._prepare_inputs(self, inputs)
        return {name: value for name, value in prepared.items() if name not in names}

    return prepare_inputs


def own_batches(self, epoch_iterator, num_batches, device):
    return [next(epoch_iterator) for _ in range(num_batches)], None


def forgets_callbacks(self, *args, **kwargs):
    self.callback_handler.callbacks = []
    return ProConTrainer.train(self, *args, **kwargs)


def alpha_of_its_own(self, *args, **kwargs):
    self.procon.step.alpha = 0.0
    return ProConTrainer.training_step(self, *args, **kwargs)


def disabled(self, *args, **kwargs):
    constraint = self.procon.constraint
    if constraint is not None:
        self.procon.pause = lambda paused: setattr(constraint, "enabled", False)
        constraint.penalty = lambda tokens: torch.zeros((), requires_grad=True)
    return ProConTrainer.compute_loss(self, *args, **kwargs)


def having(**methods: Callable) -> type:
    """A trainer with these methods in place of ours."""
    return type("Changed", (ProConTrainer,), methods)


for _name, _kind, _short in (
    ("compute_loss without super()", having(compute_loss=without_super), True),
    (
        "compute_loss with outputs of super() and a loss of its own",
        losing(lambda self, loss, outputs, labels: own_loss(outputs.logits, labels)),
        True,
    ),
    ("compute_loss that returns outputs.loss", losing(lambda self, loss, outputs, labels: outputs.loss), False),
    (
        "compute_loss that multiplies by 0",
        losing(lambda self, loss, outputs, labels: own_loss(outputs.logits, labels) + 0 * loss),
        True,
    ),
    (
        "compute_loss that detaches",
        losing(lambda self, loss, outputs, labels: own_loss(outputs.logits, labels) + loss.detach()),
        False,
    ),
    (
        "compute_loss that drops the penalty at every second step",
        losing(lambda self, loss, outputs, labels: outputs.loss if self.state.global_step % 2 else loss),
        False,
    ),
    ("compute_loss that halves", losing(lambda self, loss, outputs, labels: 0.5 * loss), False),
    (
        "compute_loss that adds a term",
        losing(lambda self, loss, outputs, labels: loss + 1e-3 * outputs.logits.square().mean()),
        False,
    ),
    ("training_step of its own", stepping(plain_step), True),
    (
        "training_step that calls compute_loss",
        stepping(lambda self, model, inputs, number: self.compute_loss(model, inputs, num_items_in_batch=number)),
        False,
    ),
    ("training_step that calls compute_loss and drops the penalty", stepping(step_that_drops), False),
    ("get_train_dataloader without super()", having(get_train_dataloader=another_loader), False),
    ("AnchoredCollator without anchors", having(get_train_dataloader=loader_without_anchors), False),
    ("anchors removed from the batch", having(_prepare_inputs=removed("anchors", "constraint_mask")), False),
    ("mask removed from the batch", having(_prepare_inputs=removed("constraint_mask")), False),
    ("get_batch_samples without super()", having(get_batch_samples=own_batches), False),
    ("callbacks removed", having(train=forgets_callbacks), True),
    ("alpha overridden with 0", having(training_step=alpha_of_its_own), False),
    ("penalty of no model", having(compute_loss=disabled), False),
):
    compare(_name, partial(trainer, kind=_kind), short=_short)

ACCUMULATED = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
compare(
    "compute_loss that drops the penalty of the second micro-batch",
    partial(
        trainer,
        kind=losing(lambda self, loss, outputs, labels: loss if self.calls % 2 else outputs.loss),
        **ACCUMULATED,
    ),
)


def loss_func(outputs, labels, num_items_in_batch=None):
    return own_loss(outputs["logits"], labels)


compare("compute_loss_func", partial(trainer, extra={"compute_loss_func": loss_func}))
for _name, _settings in {
    "label smoothing": {"label_smoothing_factor": 0.1},
    "remove_unused_columns=False": {"remove_unused_columns": False},
    "accumulation": ACCUMULATED,
    "loader workers": {"dataloader_num_workers": 1},
    "bf16": {"bf16": True},
    "auto_find_batch_size": {"auto_find_batch_size": True},
    "torch_compile": {"torch_compile": True, "torch_compile_backend": "eager"},
}.items():
    compare(_name, partial(trainer, **_settings))
for _name, _reentrant in (("non-reentrant checkpointing", False), ("reentrant checkpointing", True)):
    _kwargs = {"use_reentrant": _reentrant}
    compare(_name, partial(trainer, gradient_checkpointing=True, gradient_checkpointing_kwargs=_kwargs))


# Callbacks


class Calls(TrainerCallback):
    """Does something to the model as a step begins, or as training does."""

    def __init__(self, *, step: Callable | None = None, begin: Callable | None = None) -> None:
        self.step, self.begin = step, begin

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if self.step:
            self.step(model)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if self.begin:
            self.begin(model)


def _forward(model: nn.Module) -> None:
    model.train()
    model(torch.tensor([[5, 6, 7]])).logits.sum()


def _generate(model: nn.Module) -> None:
    model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2)


def _freeze(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lm_head" in name)


def _patch_norms(model: nn.Module) -> None:
    for block in find_decoder(model).blocks:
        norm = block.input_layernorm
        norm.forward = lambda hidden, norm=norm: type(norm).forward(norm, hidden)


for _name, _callback in (
    ("model.eval() in a callback", Calls(step=lambda model: model.eval())),
    ("a training forward in a callback", Calls(step=_forward)),
    ("generate in a callback", Calls(step=_generate)),
    ("frozen but for the head as training begins", Calls(begin=_freeze)),
    ("norms patched as training begins", Calls(begin=_patch_norms)),
):
    compare(_name, lambda folder, alpha, c=_callback: trainer(folder, alpha, callbacks=(c,)))


# What trains


def frozen_but(part: str, build: Callable[..., Any] = trainer) -> Callable[..., Any]:
    def built(folder: Path, alpha: float | str) -> Any:
        start = model()
        for name, parameter in start.named_parameters():
            parameter.requires_grad_(part in name)
        return build(folder, alpha, start=start)

    return built


for _name, _part in {
    "the head": "lm_head",
    "the last norm": "model.norm",
    "the last block": "layers.2.",
    "the first block": "layers.0.",
}.items():
    compare(f"only {_name} trains", frozen_but(_part))
compare("only embeddings train", frozen_but("embed_tokens"))

for _name, _settings in {
    "LoRA": {},
    "LoRA on the last block": {"layers_to_transform": [BLOCKS - 1]},
    "LoRA on block 1 alone": {"layers_to_transform": [1]},
    "LoRA on the head alone": {"target_modules": ["lm_head"]},
}.items():
    compare(
        _name,
        lambda folder, alpha, settings=_settings: trainer(folder, alpha, start=lora(**settings)),
        short=not _settings,
    )
compare(
    "LoRA above the constrained blocks",
    lambda folder, alpha: trainer(folder, alpha, start=lora(layers_to_transform=[2]), procon_blocks="0,1"),
)


def of_parameters(choose: Callable[[nn.Module], list], build: Callable[..., Any] = trainer) -> Callable[..., Any]:
    """An optimiser of parameters of the user's choice."""

    def built(folder: Path, alpha: float | str) -> Any:
        start = model()
        optimizer = torch.optim.SGD(choose(start), lr=0.1)
        return build(folder, alpha, start=start, extra={"optimizers": (optimizer, None)})

    return built


of_the_head = partial(of_parameters, lambda m: list(m.lm_head.parameters()))
compare("an optimiser of the head alone", of_the_head(), short=True)
compare("an optimiser of another model", of_parameters(lambda m: list(copy.deepcopy(m).parameters())))
compare("an optimiser of all", of_parameters(lambda m: list(m.parameters())))


def replaced_model(folder: Path, alpha: float | str) -> Any:
    built = trainer(folder, alpha)
    built.model_wrapped = built.model = model()
    return built


compare("trainer.model replaced", replaced_model)


@scenario("adapters changed after attach", "ProConTrainer")
def other_adapters(folder: Path) -> Outcome:
    start = lora()
    start.add_adapter("other", start.peft_config["default"])
    switch = Calls(begin=lambda m: m.set_adapter("other"))
    return refused(trainer(folder, start=start, callbacks=(switch,)).train)


compare("a copied model", lambda folder, alpha: trainer(folder, alpha, start=copy.deepcopy(model())))


# Data


def of_rows(change: Callable[[dict], dict], **settings: Any) -> Callable[..., Any]:
    def build(folder: Path, alpha: float | str) -> Any:
        data = Dataset.from_list([change(row) for row in rows()])
        return trainer(folder, alpha, data=data, **settings)

    return build


def _unlabelled(row: dict) -> dict:
    return {**row, "labels": [-100] * len(row["labels"])}


compare("no labels, and only responses are constrained", of_rows(_unlabelled, procon_scope="response"))
compare("no labels, and all tokens are constrained", of_rows(_unlabelled))
compare("samples of one token", of_rows(lambda row: {name: value[:1] for name, value in row.items()}))


class Draws(torch.utils.data.Dataset):
    """Other rows at each reading."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(3)

    def __len__(self) -> int:
        return 4

    def __getitem__(self, number: int) -> dict:
        ids = torch.randint(5, 60, (6,), generator=self.generator).tolist()
        return {"input_ids": ids, "labels": ids}


compare("rows drawn at random", lambda folder, alpha: trainer(folder, alpha, data=Draws()))


# Directions


def _with(**changes: Any) -> Directions:
    return replace(directions(), **changes)


@scenario("directions of zeros with a gap of 1", "ProConTrainer", short=True)
def zero_directions(folder: Path) -> Outcome:
    def trained(place: Path, alpha: float | str) -> nn.Module:
        zeros = _with(basis=torch.zeros_like(directions().basis))
        return train(trainer(place, alpha, given=zeros if alpha != "0" else directions()))

    return against_plain(trained, folder)


for _name, _changes in {
    "directions without a gap": {"gaps": torch.zeros(BLOCKS, 1)},
    "directions that are not finite": {"basis": directions().basis * torch.nan},
}.items():
    scenario(_name, "ProConTrainer")(
        lambda folder, changes=_changes: refused(lambda: trainer(folder, given=_with(**changes)).train())
    )


@scenario("no directions, and no chat template", "ProConTrainer")
def no_directions(folder: Path) -> Outcome:
    def build() -> None:
        ProConTrainer(
            model(),
            config(folder),
            train_dataset=Dataset.from_list(rows()),
            data_collator=padding_collator(tokenizer()),
            processing_class=tokenizer(),
        ).train()

    return refused(build)


# Of our callback in someone's trainer


class FromLogits(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs["labels"]
        outputs = model(**inputs)
        loss = own_loss(outputs.logits, labels)
        return (loss, outputs) if return_outputs else loss


class WithoutLabels(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        return own_loss(model(**inputs).logits, labels)


class OfAnother(Trainer):
    """Trains a copy of the model that it names."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.other = getattr(self, "other", None) or copy.deepcopy(self.model)
        loss = self.other(**self._prepare_inputs(inputs)).loss
        loss.backward()
        for own, other in zip(self.model.parameters(), self.other.parameters(), strict=True):
            own.grad = other.grad
        return loss.detach()


def callback_scenario(name: str, *, short: bool = False, **settings: Any) -> None:
    compare(name, lambda folder, alpha: by_callback(folder, alpha, **settings), door="ProConCallback", short=short)


callback_scenario("as it is meant", short=True)
callback_scenario("a loss from logits", kind=FromLogits)
callback_scenario("a loss without labels in the forward", kind=WithoutLabels)
callback_scenario("another model object trains", kind=OfAnother)
callback_scenario("label smoothing", label_smoothing_factor=0.1)
callback_scenario("compute_loss_func", extra={"compute_loss_func": loss_func})
callback_scenario("model.eval() in a callback", callbacks=(Calls(step=lambda model: model.eval()),))
callback_scenario("accumulation", **ACCUMULATED)
compare("only the head trains", frozen_but("lm_head", by_callback), door="ProConCallback")
compare("an optimiser of the head alone", of_the_head(by_callback), door="ProConCallback")
