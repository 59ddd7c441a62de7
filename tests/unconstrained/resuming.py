"""Trainings that go on from a checkpoint: as if nothing had happened, or not at all."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from datasets import Dataset
from setting import Outcome, directions, equal, lora, model, rows, scenario, trainer, warnings_of_procon, weights
from transformers import TrainerCallback

from procon import ProConError

SAVES = {"save_strategy": "steps", "save_steps": 2, "logging_strategy": "steps", "logging_steps": 1}


class Killed(Exception):
    """In place of a signal."""


class Kill(TrainerCallback):
    """Ends training by an error after five of its six steps, when the checkpoints of steps 2 and 4 are there."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise Killed


def dropping() -> Any:
    """A model with an adapter and dropout, so that random states matter."""
    return lora(model(attention_dropout=0.3))


@cache
def interrupted(kind: str) -> tuple[Path, dict[str, torch.Tensor]]:
    """The folder of a run that was killed, and the weights of one that was not."""
    start = {"LoRA": dropping, "full": model}[kind]
    whole = trainer(Path(mkdtemp()) / "whole", start=start(), **SAVES)
    whole.train()
    killed = Path(mkdtemp()) / "killed"
    try:
        trainer(killed, start=start(), callbacks=(Kill(),), **SAVES).train()
    except Killed:
        return killed, weights(whole.model)
    raise AssertionError("was not killed")


def resumed(
    spoil: Callable[[Path], object] = lambda _: None,
    build: Callable[[Path], Any] | None = None,
    *,
    kind: str = "LoRA",
    checkpoint: str | None = None,
) -> Callable[[Path], Outcome]:
    """Spoil a copy of the folder of a killed run, and go on from it by the trainer that ``build`` makes."""
    start = {"LoRA": dropping, "full": model}[kind]

    def run(folder: Path) -> Outcome:
        killed, expected = interrupted(kind)
        shutil.rmtree(folder)
        shutil.copytree(killed, folder)
        spoil(folder)
        with warnings_of_procon() as warned:
            try:
                ours = (build or (lambda place: trainer(place, start=start(), **SAVES)))(folder)
                ours.train(resume_from_checkpoint=str(folder / checkpoint) if checkpoint else True)
            except ProConError as error:
                return Outcome("refused", str(error))
        if equal(weights(ours.model), expected):
            return Outcome("same", "; ".join(warned))
        return Outcome("SILENT", "ends in other weights")

    return run


def case(name: str, *args: Any, short: bool = False, **kwargs: Any) -> None:
    scenario(f"resumed: {name}", "ProConTrainer", short=short)(resumed(*args, **kwargs))


LATEST = "checkpoint-4"


def flip(folder: Path) -> None:
    path = folder / LATEST / "optimizer.pt"
    content = bytearray(path.read_bytes())
    content[len(content) * 3 // 4] ^= 1
    path.write_bytes(content)


case("nothing changed", short=True)
case("nothing changed, all weights", kind="full")
case("nothing changed, from a checkpoint by name", checkpoint="checkpoint-2")

# What else may be damaged, and how, is in tests/training/test_checkpoints.py and tests/faults.
for _file in ("optimizer.pt", "rng_state.pth"):
    case(f"{_file} missing", lambda folder, name=_file: (folder / LATEST / name).unlink(), short=True)
case("a bit of optimizer.pt flipped", flip, short=True)
case("optimizer.pt missing, by name", lambda folder: (folder / LATEST / "optimizer.pt").unlink(), checkpoint=LATEST)


def no_record(folder: Path) -> None:
    for path in folder.glob("checkpoint-*"):
        (path / "procon.json").unlink()


case("no procon.json in any checkpoint", no_record)
case("anchors missing", lambda folder: shutil.rmtree(folder / "_anchors"))
case("no checkpoint at all", lambda folder: [shutil.rmtree(path) for path in folder.glob("checkpoint-*")])


def other(**settings: Any) -> Callable[[Path], Any]:
    return lambda folder: trainer(folder, start=dropping(), **{**SAVES, **settings})


def other_start(make: Callable[[], Any]) -> Callable[[Path], Any]:
    return lambda folder: trainer(folder, start=make(), **SAVES)


def other_data(change: Callable[[list], list]) -> Callable[[Path], Any]:
    return lambda folder: trainer(folder, start=dropping(), data=Dataset.from_list(change(rows())), **SAVES)


def other_base() -> Any:
    base = model(attention_dropout=0.3)
    torch.nn.init.normal_(base.model.layers[1].mlp.up_proj.weight)
    return lora(base)


case("another base model", build=other_start(other_base), short=True)
case("another configuration", build=other_start(lambda: lora(model(attention_dropout=0.3, rope_theta=500.0))))
case("no dropout", build=other_start(lambda: lora(model())))
case("another scale of the adapter", build=other_start(lambda: lora(model(attention_dropout=0.3), lora_alpha=32)))
case("another rank of the adapter", build=other_start(lambda: lora(model(attention_dropout=0.3), r=4)))
case(
    "another target of the adapter",
    build=other_start(lambda: lora(model(attention_dropout=0.3), target_modules=["q_proj"])),
)
case("no adapter", build=other_start(lambda: model(attention_dropout=0.3)))
case("another precision of the weights", build=other_start(lambda: dropping().bfloat16()))
case("another seed", build=other(seed=7), short=True)
case("another data seed", build=other(data_seed=7))
case("another batch size", build=other(per_device_train_batch_size=1))
case("more accumulation", build=other(gradient_accumulation_steps=2))
case("another optimiser", build=other(optim="sgd"))
case("another precision", build=other(bf16=True))
case("fewer rows", build=other_data(lambda given: given[:-1]))
case("more rows", build=other_data(lambda given: [*given, *rows(seed=2)]))
case("rows in another order", build=other_data(lambda given: given[::-1]), short=True)
case("another row", build=other_data(lambda given: [*given[:-1], rows(seed=2)[0]]))
case("schedule 0", build=lambda folder: trainer(folder, "0", start=dropping(), **SAVES), short=True)
case("another alpha", build=lambda folder: trainer(folder, 49.0, start=dropping(), **SAVES))
case("a schedule that has ended", build=lambda folder: trainer(folder, "50@1ep,0", start=dropping(), **SAVES))
case("another scope", build=other(procon_scope="response"))
case("another penalty", build=other(procon_penalty="absolute"))
case("other blocks", build=other(procon_blocks="1,2"))


def other_directions(folder: Path) -> Any:
    return trainer(folder, start=dropping(), given=directions(seed=1), **SAVES)


case("other directions", build=other_directions)


@scenario("resumed: a plain run under the constraint", "ProConTrainer")
def plain_then_constrained(folder: Path) -> Outcome:
    with contextlib.suppress(Killed):
        trainer(folder, "0", start=dropping(), callbacks=(Kill(),), **SAVES).train()
    try:
        trainer(folder, start=dropping(), **SAVES).train(resume_from_checkpoint=True)
    except ProConError as error:
        return Outcome("refused", str(error))
    return Outcome("SILENT", "goes on")


@scenario("resumed: checkpoints of the model only", "ProConTrainer", short=True)
def only_model(folder: Path) -> Outcome:
    settings = {**SAVES, "save_only_model": True}
    with contextlib.suppress(Killed):
        trainer(folder, start=dropping(), callbacks=(Kill(),), **settings).train()
    try:
        trainer(folder, start=dropping(), **settings).train(resume_from_checkpoint=True)
    except ProConError as error:
        return Outcome("refused", str(error))
    return Outcome("SILENT", "goes on")


@scenario("resumed: what was done is counted on", "ProConTrainer", short=True)
def counts(folder: Path) -> Outcome:
    killed, _ = interrupted("LoRA")
    shutil.rmtree(folder)
    shutil.copytree(killed, folder)
    ours = trainer(folder, start=dropping(), **SAVES)
    ours.train(resume_from_checkpoint=True)
    ours.save_model()
    did = json.loads((folder / "procon.json").read_text())["did"]
    right = (did["steps"], did["constrained_steps"]) == (6, 6)
    return Outcome("same" if right else "SILENT", f"{did['constrained_steps']} of {did['steps']} steps")
