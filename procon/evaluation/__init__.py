"""Measures of a model: does it refuse, does it answer, how far has refusal drifted?

In: a model, prompts, a task with known answers, judges, directions of the start.
Out: rates with intervals, cosines and shifts.
May import: ``directions``, ``chat``, ``models`` and the leaves.
"""

from procon.errors import require_extra

__extra__ = require_extra("train", __name__)

from procon.evaluation.drift import Drift, compare_means, measure_drift
from procon.evaluation.evaluation import Evaluation, NothingFinished, evaluate
from procon.evaluation.judges import (
    FORMATS,
    EndpointJudge,
    Format,
    Judge,
    KeywordJudge,
    ModelJudge,
    Verdict,
    load_judges,
)
from procon.evaluation.metrics import (
    METRICS,
    Metric,
    contains_answer,
    exact_match,
    extract_answer,
    find_metric,
    rouge_l,
)
from procon.evaluation.rates import Z_95, Mean, Rate

__all__ = [
    "FORMATS",
    "METRICS",
    "Z_95",
    "Drift",
    "EndpointJudge",
    "Evaluation",
    "Format",
    "Judge",
    "KeywordJudge",
    "Mean",
    "Metric",
    "ModelJudge",
    "NothingFinished",
    "Rate",
    "Verdict",
    "compare_means",
    "contains_answer",
    "evaluate",
    "exact_match",
    "extract_answer",
    "find_metric",
    "load_judges",
    "measure_drift",
    "rouge_l",
]
