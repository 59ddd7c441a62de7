"""Measures of a model: does it refuse, does it answer, how far has refusal drifted, do monitors still read it?

In: a model, prompts, a task with known answers, directions of the start, monitors.
Out: rates with intervals, log-odds, what each block does to them, cosines and shifts, areas under curves.
May import: ``directions``, ``chat``, ``models`` and the leaves.
"""

from procon.evaluation.causal_effects import block_effects, causal_weights
from procon.evaluation.drift import Drift, compare_means, measure_drift
from procon.evaluation.evaluation import Z_95, Evaluation, NothingFinished, Rate, evaluate, exact_match, extract_answer
from procon.evaluation.monitors import MonitorChange, MonitorReading, compare_monitors, measure_monitors
from procon.evaluation.refusal_odds import first_token_log_probabilities, refusal_log_odds, refusal_tokens

__all__ = [
    "Z_95",
    "Drift",
    "Evaluation",
    "MonitorChange",
    "MonitorReading",
    "NothingFinished",
    "Rate",
    "block_effects",
    "causal_weights",
    "compare_means",
    "compare_monitors",
    "evaluate",
    "exact_match",
    "extract_answer",
    "first_token_log_probabilities",
    "measure_drift",
    "measure_monitors",
    "refusal_log_odds",
    "refusal_tokens",
]
