"""Other defences than ProCon, on transformers' Trainer: each in a file of its own, all of them by name in one registry.

In: what a Trainer takes, and what the defence needs: directions, alignment data, a base model.
Out: a trainer that fine-tunes under that defence.
May import: ``training``, ``data`` and the rooms below them.
"""

from procon.errors import require_extra

__extra__ = require_extra("train", __name__)

from procon.defences.constrained_sft import ConstrainedSFTTrainer
from procon.defences.frozen_layers import FrozenLayersTrainer
from procon.defences.hidden_states import HiddenStatesTrainer
from procon.defences.lisa import LisaTrainer
from procon.defences.registry import DEFENCES, Defence, build_trainer, find_defence
from procon.defences.safe_lora import SafeLoRATrainer, project_update
from procon.defences.steering import SteeringTrainer
from procon.models import StartingModel

__all__ = [
    "DEFENCES",
    "ConstrainedSFTTrainer",
    "Defence",
    "FrozenLayersTrainer",
    "HiddenStatesTrainer",
    "LisaTrainer",
    "SafeLoRATrainer",
    "StartingModel",
    "SteeringTrainer",
    "build_trainer",
    "find_defence",
    "project_update",
]
