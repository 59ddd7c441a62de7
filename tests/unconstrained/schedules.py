"""Schedules and lengths of training under which alpha might never be above 0."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from datasets import Dataset
from folders import claims
from setting import (
    ALPHA,
    Outcome,
    against_plain,
    config,
    directions,
    model,
    refused,
    rows,
    scenario,
    tokenizer,
    train,
    trainer,
)
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from procon.data import padding_collator
from procon.integrations import ProConCallback
from procon.training.sft import ProConSFTConfig, ProConSFTTrainer


def sft(folder: Path, alpha: float | str, **settings):
    set_seed(0)
    args = config(folder, alpha, made_by=ProConSFTConfig, bf16=False, max_length=32, **settings)
    data = Dataset.from_list(rows())
    return ProConSFTTrainer(model(), args, directions=directions(), train_dataset=data, processing_class=tokenizer())


def by_callback(
    folder: Path, alpha: float | str, *, kind: type = Trainer, callbacks=(), start=None, extra=None, **settings
):
    """A plain Trainer with our callback."""
    set_seed(0)
    start = model() if start is None else start
    ours = ProConCallback(directions(), schedule=str(alpha), penalty="squared", terms="tokens")
    full = config(folder, "0", **settings)
    names = ("output_dir", "num_train_epochs", "per_device_train_batch_size", "learning_rate", "save_strategy")
    kept = {name: getattr(full, name) for name in (*names, "logging_strategy", "report_to", "disable_tqdm", "use_cpu")}
    own = {name: value for name, value in settings.items() if not name.startswith("procon_")}
    return kind(
        start,
        TrainingArguments(**{**kept, **own}),
        train_dataset=Dataset.from_list(rows()),
        data_collator=padding_collator(tokenizer()),
        callbacks=[ours, *callbacks],
        **(extra or {}),
    )


DOORS = {"ProConTrainer": trainer, "SFTTrainer": sft, "ProConCallback": by_callback}

#: By door, with A for the strength. All are one trainer's; the others' length of training and warm-up are their own.
SCHEDULES = {
    "ProConTrainer": (
        *("A", "procon_s:1e-300", "procon_s:1e-25", "0@1000steps,A", "0@2ep,A", "0@3ep,A", "0@6steps,A", "0@5steps,A"),
        *("A@0.0000001ep,0", "A@1ep,0", "0@1ep,A@1ep,0", "0@50ep,A@1ep,0", "1e-300@1ep,0"),
        *("procon_wu:A@0.0000001ep", "procon_wu:0@4ep", "procon_wu:A@1ep"),
    ),
    "SFTTrainer": ("A", "0@2ep,A", "procon_wu:A@1ep"),
    "ProConCallback": ("A", "0@3ep,A", "0@5steps,A", "A@0.0000001ep,0", "procon_wu:A@1ep"),
}

_SHORT = {("ProConTrainer", "0@1000steps,A"), ("ProConTrainer", "procon_wu:0@4ep"), ("ProConCallback", "0@3ep,A")}


def run(door: str, schedule: str, folder: Path) -> Outcome:
    def trained(place: Path, alpha: float | str):
        given = schedule.replace("A", str(ALPHA)) if alpha != "0" else "0"
        # In two epochs, where the schedule counts two.
        epochs = 2 if "2ep" in schedule else 3
        extra = 1 if alpha == "0" and "procon_wu" in schedule and door != "ProConCallback" else 0
        return train(DOORS[door](place, given, num_train_epochs=epochs + extra))

    return against_plain(trained, folder)


for _door, _schedules in SCHEDULES.items():
    for _schedule in _schedules:
        scenario(f"schedule {_schedule}", _door, short=(_door, _schedule) in _SHORT)(partial(run, _door, _schedule))


class Stop(TrainerCallback):
    """Ends training after two steps."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= 2


for _door, _short in (("ProConTrainer", True), ("ProConCallback", False)):
    scenario("a callback ends training before the schedule begins", _door, short=_short)(
        lambda folder, door=_door: refused(DOORS[door](folder, "0@4steps,5", callbacks=(Stop(),)).train)
    )
for _epochs in (0, -1):
    scenario(f"num_train_epochs {_epochs}", "ProConTrainer")(
        lambda folder, epochs=_epochs: refused(trainer(folder, num_train_epochs=epochs).train)
    )


@scenario("a phase that is never reached", "ProConTrainer")
def late_phase(folder: Path) -> Outcome:
    def trained(place: Path, alpha: float | str):
        return train(trainer(place, "50@1ep,0@100steps,5" if alpha != "0" else "0"))

    return against_plain(trained, folder)


def _said(folder: Path, schedule: str) -> Outcome:
    built = trainer(folder, schedule)
    built.train()
    built.save_model()
    return Outcome("SILENT", "claims a constraint") if claims(folder) else Outcome("said", "constrained: false")


for _schedule in ("0", "0@2ep,0"):
    scenario(f"schedule {_schedule}, on purpose", "ProConTrainer")(partial(_said, schedule=_schedule))
