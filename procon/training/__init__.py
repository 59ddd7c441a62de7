"""Constrained fine-tuning over transformers' Trainer and what extends it; TRL's trainers are in
``procon.training.sft`` and ``procon.training.preferences``.

In: a Trainer's model, arguments and data, and directions.
Out: the fine-tuned model, with what it was trained under beside it, and a log.
May import: ``evaluation``, ``anchors``, ``constraint``, ``data`` and the rooms below them.
"""

from procon.errors import require_extra

__extra__ = require_extra("train", __name__)

from procon.training.callbacks import DriftCallback, EvaluationCallback
from procon.training.config import ProConArguments, ProConConfig
from procon.training.protect import protect
from procon.training.trainer import ProConMixin, ProConTrainer

__all__ = [
    "DriftCallback",
    "EvaluationCallback",
    "ProConArguments",
    "ProConConfig",
    "ProConMixin",
    "ProConTrainer",
    "protect",
]
