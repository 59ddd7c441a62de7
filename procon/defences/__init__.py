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
from procon.defences.kl_to_start import KLToStartTrainer
from procon.defences.lisa import LisaTrainer
from procon.defences.moving_average import MovingAverageTrainer
from procon.defences.null_space import NullSpaceTrainer
from procon.defences.projected_gradients import ProjectedGradientsTrainer
from procon.defences.registry import DEFENCES, Defence, build_trainer, find_defence
from procon.defences.safe_lora import SafeLoRATrainer, project_update
from procon.defences.safe_merge import SafeMergeTrainer
from procon.defences.safety_step import SafetyStepTrainer
from procon.defences.steering import SteeringTrainer
from procon.models import StartingModel

__all__ = [
    "DEFENCES",
    "ConstrainedSFTTrainer",
    "Defence",
    "FrozenLayersTrainer",
    "HiddenStatesTrainer",
    "KLToStartTrainer",
    "LisaTrainer",
    "MovingAverageTrainer",
    "NullSpaceTrainer",
    "ProjectedGradientsTrainer",
    "SafeLoRATrainer",
    "SafeMergeTrainer",
    "SafetyStepTrainer",
    "StartingModel",
    "SteeringTrainer",
    "build_trainer",
    "find_defence",
    "project_update",
]
