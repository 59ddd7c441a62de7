"""Measures of a model: does it refuse, does it answer, how far has refusal drifted?

In: a model, prompts, a task with known answers, directions of the start.
Out: rates with intervals, log-odds, what each block does to them, cosines and shifts.
May import: ``directions``, ``chat``, ``models`` and the leaves.
"""

from procon.evaluation.causal_effects import block_effects, causal_weights
from procon.evaluation.drift import Drift, compare_means, measure_drift
from procon.evaluation.evaluation import Z_95, Evaluation, Rate, evaluate, exact_match, extract_answer
from procon.evaluation.refusal_odds import first_token_log_probabilities, refusal_log_odds, refusal_tokens

__all__ = [
    "Z_95",
    "Drift",
    "Evaluation",
    "Rate",
    "block_effects",
    "causal_weights",
    "compare_means",
    "evaluate",
    "exact_match",
    "extract_answer",
    "first_token_log_probabilities",
    "measure_drift",
    "refusal_log_odds",
    "refusal_tokens",
]
