"""Measures of a model: does it refuse, does it answer, how far has refusal drifted?

In: a model, prompts, a task with known answers, a judge, directions of the start.
Out: rates with intervals, cosines and shifts.
May import: ``directions``, ``chat``, ``models`` and the leaves.
"""

from procon.errors import require_extra

__extra__ = require_extra("train", __name__)

from procon.evaluation.drift import Drift, compare_means, measure_drift
from procon.evaluation.endpoint import EndpointJudge, load_judge
from procon.evaluation.evaluation import Evaluation, NothingFinished, evaluate
from procon.evaluation.judges import FORMATS, Format, Judge, KeywordJudge, ModelJudge, Verdict
from procon.evaluation.rates import Metric, Rate, exact_match, extract_answer, find_metric, rouge_l

__all__ = [
    "FORMATS",
    "Drift",
    "EndpointJudge",
    "Evaluation",
    "Format",
    "Judge",
    "KeywordJudge",
    "Metric",
    "ModelJudge",
    "NothingFinished",
    "Rate",
    "Verdict",
    "compare_means",
    "evaluate",
    "exact_match",
    "extract_answer",
    "find_metric",
    "load_judge",
    "measure_drift",
    "rouge_l",
]
