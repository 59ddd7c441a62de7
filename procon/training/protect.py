"""One line for a trainer that one has: ``procon.protect(trainer)``."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

from transformers import Trainer

from procon.directions import Directions
from procon.errors import ProConError
from procon.settings import ChatSettings, ProConSettings
from procon.training.trainer import ProConMixin

_Trainer = TypeVar("_Trainer", bound=Trainer)

#: By trainers of TRL, where the class is that constrains them. Other classes are constrained as the Trainer is.
_KIN = {
    "trl.trainer.dpo_trainer.DPOTrainer": ("procon.training.preferences", "ProConDPOTrainer"),
    "trl.trainer.kto_trainer.KTOTrainer": ("procon.training.preferences", "ProConKTOTrainer"),
    "trl.experimental.kto.kto_trainer.KTOTrainer": ("procon.training.preferences", "ProConKTOTrainer"),
    "trl.trainer.grpo_trainer.GRPOTrainer": ("procon.training.preferences", "ProConGRPOTrainer"),
    "trl.trainer.sft_trainer.SFTTrainer": ("procon.training.sft", "ProConSFTTrainer"),
}


def protect(
    trainer: _Trainer,
    directions: Directions | str | Path | None = None,
    *,
    chat: ChatSettings | None = None,
    **settings: Any,
) -> _Trainer:
    """Have a trainer train under the constraint, bitwise as ``ProConTrainer`` or its kin would; returns the trainer::

        trainer = SFTTrainer(model, train_dataset=dataset)
        procon.protect(trainer).train()

    Args:
        trainer: of transformers, or TRL's SFTTrainer, DPOTrainer, KTOTrainer or GRPOTrainer, or a class of one's own
            that extends one of them; before :meth:`train`.
        directions: refusal directions of the model, or their file; where a term needs them, extracted if not given.
        chat: how the model is asked as directions and probes are found.
        settings: of :class:`procon.ProConSettings`, by name, such as ``schedule="procon_s:0.1"``.

    Raises:
        ProConError: for a trainer that cannot be constrained, which is named, or a wrong setting.
    """
    if not isinstance(trainer, Trainer):
        raise ProConError(f"{type(trainer).__name__} is no transformers Trainer: use ProCon in a loop of your own")
    if isinstance(trainer, ProConMixin):
        raise ProConError(f"{type(trainer).__name__} is constrained already: give the settings to its arguments")
    if trainer.state.global_step or getattr(trainer, "optimizer", None) is not None:
        raise ProConError("the trainer has begun to train: protect it before train()")
    kind = _kind_of(type(trainer))
    bases = (kind, type(trainer)) if not issubclass(kind, type(trainer)) else (kind,)
    trainer.__class__ = type(f"ProCon{type(trainer).__name__}", bases, {"__module__": type(trainer).__module__})
    made: Any = trainer
    made.constrain(ProConSettings(**settings), directions, chat)
    return trainer


def _kind_of(trainer: type[Trainer]) -> type[ProConMixin]:
    """What constrains a class of trainers; ProConError if nothing does."""
    for base in trainer.__mro__:
        name = f"{base.__module__}.{base.__qualname__}"
        if name in _KIN:
            module, kind = _KIN[name]
            return getattr(import_module(module), kind)
        if base.__module__.split(".")[0] == "trl" and base.__name__.endswith("Trainer") and base.__name__[0] != "_":
            raise ProConError(
                f"{base.__name__} of TRL is not constrained: SFTTrainer, DPOTrainer, KTOTrainer and GRPOTrainer are"
            )
    return ProConMixin
