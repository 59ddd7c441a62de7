"""Other defences than ProCon, each a Trainer in a file of its own, and all of them by name in one registry."""

from benchmarks.study.defences.constrained_sft import ConstrainedSFTTrainer
from benchmarks.study.defences.frozen_layers import FrozenLayersTrainer
from benchmarks.study.defences.hidden_states import HiddenStatesTrainer
from benchmarks.study.defences.kl_to_start import KLToStartTrainer
from benchmarks.study.defences.lisa import LisaTrainer
from benchmarks.study.defences.moving_average import MovingAverageTrainer
from benchmarks.study.defences.null_space import NullSpaceTrainer
from benchmarks.study.defences.projected_gradients import ProjectedGradientsTrainer
from benchmarks.study.defences.registry import DEFENCES, Defence, build_trainer
from benchmarks.study.defences.safe_lora import SafeLoRATrainer, project_update
from benchmarks.study.defences.safe_merge import SafeMergeTrainer
from benchmarks.study.defences.safety_step import SafetyStepTrainer
from benchmarks.study.defences.steering import SteeringTrainer

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
    "SteeringTrainer",
    "build_trainer",
    "project_update",
]
