"""Constrained fine-tuning over transformers' Trainer and what extends it; TRL's is in ``procon.training.sft``."""

from procon.training.config import ProConArguments, ProConConfig
from procon.training.jsonl import JsonlCallback
from procon.training.mixin import ProConMixin
from procon.training.probes import DriftCallback, EvaluationCallback
from procon.training.trainer import ProConTrainer

__all__ = [
    "DriftCallback",
    "EvaluationCallback",
    "JsonlCallback",
    "ProConArguments",
    "ProConConfig",
    "ProConMixin",
    "ProConTrainer",
]
