"""Constrained fine-tuning over transformers' Trainer."""

from procon.training.config import ProConConfig
from procon.training.probes import DriftCallback, EvaluationCallback
from procon.training.trainer import ProConTrainer

__all__ = ["DriftCallback", "EvaluationCallback", "ProConConfig", "ProConTrainer"]
