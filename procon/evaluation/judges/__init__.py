"""Who says whether a reply refuses: keywords, a guard or chat model, an endpoint, or a class of one's own."""

from procon.evaluation.judges.endpoint import EndpointJudge
from procon.evaluation.judges.formats import FORMATS, Format
from procon.evaluation.judges.keywords import KeywordJudge
from procon.evaluation.judges.model import ModelJudge
from procon.evaluation.judges.names import load_judges
from procon.evaluation.judges.protocol import Judge, Reads, Verdict, judge_replies

__all__ = [
    "FORMATS",
    "EndpointJudge",
    "Format",
    "Judge",
    "KeywordJudge",
    "ModelJudge",
    "Reads",
    "Verdict",
    "judge_replies",
    "load_judges",
]
