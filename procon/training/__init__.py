"""Constrained fine-tuning over transformers' Trainer."""

from procon.training.config import ProConConfig
from procon.training.drift_callback import DriftCallback
from procon.training.trainer import ProConTrainer

__all__ = ["DriftCallback", "ProConConfig", "ProConTrainer"]
