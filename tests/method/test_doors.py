"""Every door holds the same object: losses of twenty steps under the default, each run resumed once in the middle."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from procon import ProCon, ProConConfig, ProConError, ProConSettings, ProConTrainer, protect
from procon.data import padding_collator
from procon.integrations import ConstrainedForward, ProConCallback
from procon.method.probes import PROBES_FILE, Probes

STEPS, MIDDLE, RATE = 20, 8, 1e-3

COMMON = {
    "max_steps": STEPS,
    "save_steps": MIDDLE,
    "per_device_train_batch_size": 2,
    "learning_rate": RATE,
    "lr_scheduler_type": "constant",
    "optim": "adamw_torch",
    "max_grad_norm": 0.0,
    "train_sampling_strategy": "sequential",
    "report_to": [],
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
}


#: All terms, so that each door has every one of them; and probes that run the whole model, as replies have them do.
BOTH = {"terms": "both", "probe_reply_tokens": 3, "probe_weight": 50.0}
ARGUMENTS = {f"procon_{name}": value for name, value in BOTH.items()}


class Setting:
    """What every door trains: a tiny model on eight samples, one after the other, along the same directions."""

    def __init__(self, tiny_model, tokenizer, samples, directions, folder: Path) -> None:
        self.tiny_model, self.tokenizer, self.samples, self.directions = tiny_model, tokenizer, samples, directions
        self.folder = folder

    def model(self):
        set_seed(0)
        return self.tiny_model().train()

    def loader(self) -> DataLoader:
        return DataLoader(self.samples, 2, collate_fn=padding_collator(self.tokenizer))

    def procon(self, model) -> ProCon:
        settings, folder = ProConSettings(**BOTH), self.folder / "anchors"
        return ProCon(model, self.tokenizer, settings, self.directions, folder=folder, progress=False)

    def trainer(self, kind: type, config: type, model=None, *, callbacks=(), extra=None, **settings) -> Trainer:
        sft = "SFT" in kind.__name__
        rows = [
            {"input_ids": row["input_ids"], "completion_mask": [int(label != -100) for label in row["labels"]]}
            if sft
            else row
            for row in self.samples
        ]
        if sft:
            settings |= {"gradient_checkpointing": False, "completion_only_loss": True}
        else:
            extra = {"data_collator": padding_collator(self.tokenizer), **(extra or {})}
        return kind(
            self.model() if model is None else model,
            args=config(output_dir=str(self.folder), **COMMON, **settings),
            train_dataset=Dataset.from_list(rows),
            processing_class=self.tokenizer,
            callbacks=list(callbacks),
            **(extra or {}),
        )


@pytest.fixture
def setting(tiny_model, tokenizer, samples, random_directions, tmp_path) -> Setting:
    # The first token of a sample is no target; TRL would still count it where a mask says so.
    return Setting(tiny_model, tokenizer, samples, random_directions(tiny_model()), tmp_path)


def losses(trainer: Trainer, resume: bool) -> list[float]:
    """Those of a training by a trainer, not rounded as the logged ones are."""
    found, step = [], trainer.training_step

    def training_step(*args, **kwargs):
        found.append(step(*args, **kwargs))
        return found[-1]

    trainer.training_step = training_step
    trainer.train(
        resume_from_checkpoint=str(Path(trainer.args.output_dir) / f"checkpoint-{MIDDLE}") if resume else None
    )
    return [loss.item() for loss in found]


def trl():
    return pytest.importorskip("trl", reason="SFTTrainer is TRL's")


def by_class(setting: Setting, resume: bool) -> list[float]:
    extra = {"directions": setting.directions}
    return losses(setting.trainer(ProConTrainer, ProConConfig, extra=extra, **ARGUMENTS), resume)


def protected(setting: Setting, resume: bool) -> list[float]:
    return losses(protect(setting.trainer(Trainer, TrainingArguments), setting.directions, **BOTH), resume)


def by_sft_class(setting: Setting, resume: bool) -> list[float]:
    trl()
    from procon.training.sft import ProConSFTConfig, ProConSFTTrainer

    extra = {"directions": setting.directions}
    return losses(setting.trainer(ProConSFTTrainer, ProConSFTConfig, extra=extra, **ARGUMENTS), resume)


def protected_sft(setting: Setting, resume: bool) -> list[float]:
    trainer = setting.trainer(trl().SFTTrainer, trl().SFTConfig)
    return losses(protect(trainer, setting.directions, **BOTH), resume)


def by_callback(setting: Setting, resume: bool) -> list[float]:
    callbacks = [ProConCallback(setting.directions, **BOTH)]
    return losses(setting.trainer(Trainer, TrainingArguments, callbacks=callbacks), resume)


def in_the_forward(setting: Setting, resume: bool) -> list[float]:
    class Save(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            procon.save(setting.folder / f"procon-{state.global_step}")

    model = setting.model()
    procon = setting.procon(model)
    procon.prepare(setting.loader(), resume=setting.folder / f"procon-{MIDDLE}" if resume else None)
    trainer = setting.trainer(Trainer, TrainingArguments, model, callbacks=[Save()])
    with ConstrainedForward(procon):
        return losses(trainer, resume)


def batches(loader, begin: int) -> Iterator[dict]:
    """Those of the steps from ``begin`` on."""
    step = 0
    while step < STEPS:
        for batch in loader:
            if begin <= step < STEPS:
                yield batch
            step += 1


def in_a_loop(setting: Setting, resume: bool, accelerate: bool = False) -> list[float]:
    model, found = setting.model(), []
    procon, file = setting.procon(model), setting.folder / "loop.pt"
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    loader = procon.prepare(setting.loader(), resume=setting.folder / "procon" if resume else None)
    if resume:
        kept = torch.load(file)
        model.load_state_dict(kept["model"])
        optimizer.load_state_dict(kept["optimizer"])
    backward: Callable = torch.Tensor.backward
    if accelerate:
        from accelerate import Accelerator

        accelerator = Accelerator(cpu=True)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        backward = accelerator.backward
    for batch in batches(loader, MIDDLE if resume else 0):
        procon.begin(batch)
        loss = model(**batch).loss + procon.loss()
        backward(loss)
        procon.end(optimizer)
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
        if len(found) == MIDDLE and not resume:
            procon.save(setting.folder / "procon")
            torch.save(copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()}), file)
    procon.close()
    return found


def in_accelerate(setting: Setting, resume: bool) -> list[float]:
    return in_a_loop(setting, resume, accelerate=True)


def in_lightning(setting: Setting, resume: bool) -> list[float]:
    lightning = pytest.importorskip("lightning", reason="its loop")
    found: list[float] = []

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = setting.model()

        def training_step(self, batch):
            procon.begin(batch)
            loss = self.model(**batch).loss + procon.loss()
            found.append(loss.item())
            return loss

        def on_before_optimizer_step(self, optimizer):
            procon.end(optimizer)

        def on_train_batch_end(self, *_):
            if self.trainer.global_step == MIDDLE:
                self.trainer.save_checkpoint(checkpoint)
                procon.save(setting.folder / "procon")

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=RATE, weight_decay=0.0)

    module, checkpoint = Module(), setting.folder / "lightning.ckpt"
    procon = setting.procon(module.model)
    loader = procon.prepare(setting.loader(), resume=setting.folder / "procon" if resume else None)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = lightning.Trainer(max_steps=STEPS, max_epochs=-1, **quiet)
    trainer.fit(module, loader, ckpt_path=checkpoint if resume else None)
    procon.close()
    return found


def by_axolotl(setting: Setting, resume: bool) -> list[float]:
    pytest.importorskip("axolotl", reason="its trainer")
    from dataclasses import dataclass

    from axolotl.core.training_args import AxolotlTrainingArguments

    from procon.integrations.axolotl import ProConAxolotlArguments
    from procon.integrations.axolotl_trainer import ProConAxolotlTrainer

    @dataclass
    class Arguments(ProConAxolotlArguments, AxolotlTrainingArguments):
        pass

    # Pickled with a checkpoint, by where it is found.
    Arguments.__qualname__ = Arguments.__name__
    globals()[Arguments.__name__] = Arguments
    file = str(setting.directions.save(setting.folder / "directions.safetensors"))
    return losses(setting.trainer(ProConAxolotlTrainer, Arguments, procon_directions=file, **ARGUMENTS), resume)


DOORS = {
    "ProConTrainer": by_class,
    "protect(Trainer)": protected,
    "ProConSFTTrainer": by_sft_class,
    "protect(SFTTrainer)": protected_sft,
    "callback": by_callback,
    "forward": in_the_forward,
    "bare loop": in_a_loop,
    "Accelerate": in_accelerate,
    "Lightning": in_lightning,
    "axolotl": by_axolotl,
}


#: What the class does, which every door is compared with: found once for all of them.
_FOUND: dict[str, list[float]] = {}


def reference(setting: Setting, name: str, **settings) -> list[float]:
    """Losses by the class, under ``settings``; ``name`` is what they are kept under."""
    if name not in _FOUND:
        setting.folder = setting.folder / name
        settings = {**ARGUMENTS, **settings}
        extra = {"directions": setting.directions} if settings["procon_terms"] != "probes" else {}
        trainer = setting.trainer(ProConTrainer, ProConConfig, extra=extra, **settings)
        _FOUND[name] = losses(trainer, False)
    return _FOUND[name]


def spoil_probes(folder: Path) -> None:
    """Their files are whole, and of the same prompts: only the numbers are another model's."""
    files = list(folder.rglob(PROBES_FILE))
    assert files
    for file in files:
        other = Probes.load(file)
        other.states.sub_(0.1)
        other.save(file)


@pytest.mark.parametrize("door", [name for name in DOORS if name != "ProConTrainer"])
def test_every_door_trains_alike_and_goes_on_alike(setting, door):
    found = DOORS[door](setting, False)
    assert len(found) == STEPS
    assert DOORS[door](setting, True) == pytest.approx(found[MIDDLE:], abs=1e-7)
    assert found == pytest.approx(reference(setting, "both"), abs=1e-5)
    spoil_probes(setting.folder)
    with pytest.raises(ProConError, match=r"are those of another run|not as it was written"):
        DOORS[door](setting, True)
    # Each of them acts: without it, it is another training.
    for term in ("tokens", "probes"):
        unused = {f"procon_{name}": getattr(ProConSettings, name) for name in ("probe_reply_tokens", "probe_weight")}
        alone = reference(setting, term, procon_terms=term, **(unused if term == "tokens" else {}), save_strategy="no")
        assert max(abs(one - other) for one, other in zip(found, alone, strict=True)) > 1e-3
