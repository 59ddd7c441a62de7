"""Other defences than ProCon, each a Trainer in a file of its own, and all of them by name in one registry."""

from benchmarks.study.defences.kl_to_start import KLToStartTrainer
from benchmarks.study.defences.projected_gradients import ProjectedGradientsTrainer
from benchmarks.study.defences.registry import DEFENCES, build_trainer
from benchmarks.study.defences.safety_step import SafetyStepTrainer

__all__ = [
    "DEFENCES",
    "KLToStartTrainer",
    "ProjectedGradientsTrainer",
    "SafetyStepTrainer",
    "build_trainer",
]
