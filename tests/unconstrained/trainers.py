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


class WithoutSuper(ProConTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs["labels"]
        inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        outputs = model(**inputs)
        loss = own_loss(outputs.logits, labels)
        return (loss, outputs) if return_outputs else loss


class OutputsOfSuper(ProConTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs["labels"]
        _, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        loss = own_loss(outputs.logits, labels)
        return (loss, outputs) if return_outputs else loss


class LossOfOutputs(ProConTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        _, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


class TimesZero(ProConTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs["labels"]
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        return own_loss(outputs.logits, labels) + 0 * loss


class Detached(ProConTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs["labels"]
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        return own_loss(outputs.logits, labels) + loss.detach()


class EverySecondStep(ProConTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        return outputs.loss if self.state.global_step % 2 else loss


class SecondMicroBatch(ProConTrainer):
    calls = 0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        self.calls += 1
        return loss if self.calls % 2 else outputs.loss


class Halved(ProConTrainer):
    def compute_loss(self, *args, **kwargs):
        return 0.5 * super().compute_loss(*args, **kwargs)


class WithTerm(ProConTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        return loss + 1e-3 * outputs.logits.square().mean()


class StepOfItsOwn(ProConTrainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        inputs = self._prepare_inputs(inputs)
        inputs = {name: inputs[name] for name in ("input_ids", "attention_mask", "labels")}
        loss = model(**inputs).loss
        self.accelerator.backward(loss)
        return loss.detach()


class StepThatComputes(ProConTrainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        loss = self.compute_loss(model, self._prepare_inputs(inputs), num_items_in_batch=num_items_in_batch)
        self.accelerator.backward(loss)
        if self.procon.active:
            self.procon.release()
        return loss.detach()


class StepThatDropsIt(ProConTrainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        inputs = self._prepare_inputs(inputs)
        labels = inputs["labels"]
        _, outputs = self.compute_loss(model, inputs, True, num_items_in_batch)
        loss = own_loss(outputs.logits, labels)
        self.accelerator.backward(loss)
        self.procon.release()
        return loss.detach()


class AnotherLoader(ProConTrainer):
    def get_train_dataloader(self):
        loader = DataLoader(self.train_dataset, batch_size=2, collate_fn=self.data_collator)
        return self.accelerator.prepare(loader)


class AnotherLoaderWithoutAnchors(ProConTrainer):
    def get_train_dataloader(self):
        super().get_train_dataloader()
        return DataLoader(self.train_dataset, batch_size=2, collate_fn=AnchoredCollator(self.data_collator, None))


class NoTargets(ProConTrainer):
    def _prepare_inputs(self, inputs):
        prepared = super()._prepare_inputs(inputs)
        return {name: value for name, value in prepared.items() if name not in ("anchors", "constraint_mask")}


class NoMask(ProConTrainer):
    def _prepare_inputs(self, inputs):
        prepared = super()._prepare_inputs(inputs)
        return {name: value for name, value in prepared.items() if name != "constraint_mask"}


class OwnBatches(ProConTrainer):
    def get_batch_samples(self, epoch_iterator, num_batches, device):
        return [next(epoch_iterator) for _ in range(num_batches)], None


class NoCallbacks(ProConTrainer):
    """One that has forgotten the callbacks that its base has added."""

    def train(self, *args, **kwargs):
        self.callback_handler.callbacks = []
        return super().train(*args, **kwargs)


class AlphaOfItsOwn(ProConTrainer):
    """A method of its own by which alpha is 0 all along."""

    def training_step(self, *args, **kwargs):
        self.procon.step.alpha = 0.0
        return super().training_step(*args, **kwargs)


class Disabled(ProConTrainer):
    def compute_loss(self, *args, **kwargs):
        constraint = self.procon.constraint
        if constraint is not None:
            self.procon.pause = lambda paused: setattr(constraint, "enabled", False)
            constraint.penalty = lambda tokens: torch.zeros((), requires_grad=True)
        return super().compute_loss(*args, **kwargs)


for _name, _kind, _short in (
    ("compute_loss without super()", WithoutSuper, False),
    ("compute_loss with outputs of super() and a loss of its own", OutputsOfSuper, True),
    ("compute_loss that returns outputs.loss", LossOfOutputs, False),
    ("compute_loss that multiplies by 0", TimesZero, True),
    ("compute_loss that detaches", Detached, False),
    ("compute_loss that drops the penalty at every second step", EverySecondStep, False),
    ("compute_loss that halves", Halved, False),
    ("compute_loss that adds a term", WithTerm, False),
    ("training_step of its own", StepOfItsOwn, False),
    ("training_step that calls compute_loss", StepThatComputes, False),
    ("training_step that calls compute_loss and drops the penalty", StepThatDropsIt, False),
    ("get_train_dataloader without super()", AnotherLoader, False),
    ("AnchoredCollator without anchors", AnotherLoaderWithoutAnchors, False),
    ("anchors removed from the batch", NoTargets, False),
    ("mask removed from the batch", NoMask, False),
    ("get_batch_samples without super()", OwnBatches, False),
    ("callbacks removed", NoCallbacks, False),
    ("alpha overridden with 0", AlphaOfItsOwn, False),
    ("penalty of no model", Disabled, False),
):
    compare(_name, partial(trainer, kind=_kind), short=_short)

compare(
    "compute_loss that drops the penalty of the second micro-batch",
    partial(trainer, kind=SecondMicroBatch, per_device_train_batch_size=1, gradient_accumulation_steps=2),
)


def loss_func(outputs, labels, num_items_in_batch=None):
    return own_loss(outputs["logits"], labels)


compare("compute_loss_func", partial(trainer, extra={"compute_loss_func": loss_func}))
compare("label smoothing", partial(trainer, label_smoothing_factor=0.1))
compare("remove_unused_columns=False", partial(trainer, remove_unused_columns=False))
compare("accumulation", partial(trainer, per_device_train_batch_size=1, gradient_accumulation_steps=2))
compare("loader workers", partial(trainer, dataloader_num_workers=1))
compare("bf16", partial(trainer, bf16=True))
compare("auto_find_batch_size", partial(trainer, auto_find_batch_size=True))
compare(
    "non-reentrant checkpointing",
    partial(trainer, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}),
)
compare(
    "reentrant checkpointing",
    partial(trainer, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True}),
)


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


def frozen_but(*parts: str) -> Callable[..., Any]:
    def build(folder: Path, alpha: float | str) -> Any:
        start = model()
        for name, parameter in start.named_parameters():
            parameter.requires_grad_(any(part in name for part in parts))
        return trainer(folder, alpha, start=start)

    return build


compare("only the head trains", frozen_but("lm_head"))
compare("only the last norm trains", frozen_but("model.norm"))
compare("only the last block trains", frozen_but("layers.2."))
compare("only the first block trains", frozen_but("layers.0."))
compare("only embeddings train", frozen_but("embed_tokens"))


def with_lora(**settings: Any) -> Callable[..., Any]:
    return lambda folder, alpha: trainer(folder, alpha, start=lora(**settings))


compare("LoRA", with_lora(), short=True)
compare("LoRA on the last block", with_lora(layers_to_transform=[BLOCKS - 1]))
compare("LoRA on block 1 alone", with_lora(layers_to_transform=[1]))
compare("LoRA on the head alone", with_lora(target_modules=["lm_head"]))


def lora_above_the_blocks(folder: Path, alpha: float | str) -> Any:
    return trainer(folder, alpha, start=lora(layers_to_transform=[2]), procon_blocks="0,1")


compare("LoRA above the constrained blocks", lora_above_the_blocks)


def of_parameters(choose: Callable[[nn.Module], list]) -> Callable[..., Any]:
    """An optimiser of parameters of the user's choice."""

    def build(folder: Path, alpha: float | str) -> Any:
        start = model()
        optimizer = torch.optim.SGD(choose(start), lr=0.1)
        return trainer(folder, alpha, start=start, extra={"optimizers": (optimizer, None)})

    return build


compare("an optimiser of the head alone", of_parameters(lambda m: list(m.lm_head.parameters())), short=True)
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


def compiled(folder: Path, alpha: float | str) -> Any:
    return trainer(folder, alpha, torch_compile=True, torch_compile_backend="eager")


compare("torch_compile", compiled)


def copied(folder: Path, alpha: float | str) -> Any:
    return trainer(folder, alpha, start=copy.deepcopy(model()))


compare("a copied model", copied)


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


@scenario("directions without a gap", "ProConTrainer")
def no_gap(folder: Path) -> Outcome:
    return refused(lambda: trainer(folder, given=_with(gaps=torch.zeros(BLOCKS, 1))).train())


@scenario("directions that are not finite", "ProConTrainer")
def not_finite(folder: Path) -> Outcome:
    return refused(lambda: trainer(folder, given=_with(basis=directions().basis * torch.nan)).train())


@scenario("directions of another width", "ProConTrainer")
def other_width(folder: Path) -> Outcome:
    return refused(lambda: trainer(folder, start=model(hidden_size=32)).train())


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
callback_scenario("accumulation", per_device_train_batch_size=1, gradient_accumulation_steps=2)


@scenario("only the head trains", "ProConCallback")
def callback_head_only(folder: Path) -> Outcome:
    def trained(place: Path, alpha: float | str) -> nn.Module:
        start = model()
        for name, parameter in start.named_parameters():
            parameter.requires_grad_("lm_head" in name)
        return train(by_callback(place, alpha, start=start))

    return against_plain(trained, folder)


@scenario("an optimiser of the head alone", "ProConCallback")
def callback_optimizer(folder: Path) -> Outcome:
    def trained(place: Path, alpha: float | str) -> nn.Module:
        start = model()
        optimizer = torch.optim.SGD(start.lm_head.parameters(), lr=0.1)
        return train(by_callback(place, alpha, start=start, extra={"optimizers": (optimizer, None)}))

    return against_plain(trained, folder)
