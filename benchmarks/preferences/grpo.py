"""GRPO on a rule-based reward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from benchmarks.preferences.algorithm import Algorithm
from benchmarks.preferences.reward import arithmetic_reward
from benchmarks.study.start import Start
from procon.chat import user_turn
from procon.demo import Problem
from procon.training.preferences import ProConGRPOConfig, ProConGRPOTrainer

#: Longest completion, in training and when the reward is measured.
COMPLETION = 16

#: Behind each problem, so that short replies are among those sampled from the start.
FORMAT = " End with Answer: and the number."


def formatted(problems: Sequence[Problem]) -> list[Problem]:
    """The problems with the format that is asked for."""
    return [{**problem, "instruction": problem["instruction"] + FORMAT} for problem in problems]


def _prompts(start: Start, train: Sequence[Problem], held_out: Sequence[Problem]) -> dict[str, Any]:
    rows = [{"prompt": user_turn(problem["instruction"]), "output": problem["output"]} for problem in formatted(train)]
    return {"train_dataset": Dataset.from_list(rows), "reward_funcs": arithmetic_reward(start.tokenizer)}


GRPO = Algorithm(
    "grpo",
    "GRPO",
    (GRPOTrainer, GRPOConfig),
    (ProConGRPOTrainer, ProConGRPOConfig),
    {
        "max_steps": 40,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": COMPLETION,
    },
    _prompts,
    formatted,
    COMPLETION,
    ("loss", "reward", "reward_std", "kl", "entropy", "completions/mean_length", "completions/clipped_ratio"),
)
