"""Whether drift predicts refusals: rank correlation against scipy's, and the runs where a measure is wrong."""

import numpy as np
import pytest
from scipy import stats

from benchmarks.study.gallery import Gallery
from benchmarks.study.outcomes import Outcomes
from benchmarks.study.prediction import PREDICTORS, Prediction, prediction_sections


def run(name: str, kept: float, cosine: float, *, length: float = 1.0) -> dict:
    replies = [{"refused": place < round(kept * 20), "log_odds": kept} for place in range(20)]
    return {
        "setting": "arithmetic",
        "method": {"name": name, "length": length},
        "seed": 0,
        "replies": {"malicious": replies},
        "drift": {"cosine": [None, cosine], "malicious_shift": [None, cosine - 1]},
    }


GOOD = [run(f"good{n}", 0.9 + n / 100, 0.95 + n / 1000) for n in range(5)]
BAD = [run(f"bad{n}", 0.1 * n, 0.5 + 0.05 * n) for n in range(5)]


def test_rank_correlation_is_spearmans():
    runs = [*GOOD, *BAD, run("middle", 0.7, 0.99)]
    found = Prediction.of("cosine", runs)
    assert found.rank[0] == pytest.approx(stats.spearmanr(found.values, found.kept).statistic)
    assert found.rank[1] < found.rank[0] < found.rank[2]
    assert not found.missed
    assert not found.alarms


def test_runs_where_a_measure_is_wrong_are_named():
    found = Prediction.of("cosine", [*GOOD, *BAD, run("hidden", 0.2, 0.99), run("harmless", 0.95, 0.5)])
    assert found.missed == ("arithmetic/hidden/seed-0",)
    assert found.alarms == ("arithmetic/harmless/seed-0",)


def test_what_is_not_trained_predicts_nothing():
    few = Outcomes((*GOOD, *BAD[:4], *(run("start", 1.0, 1.0, length=0) for _ in range(5))))
    assert prediction_sections(few, Gallery("assets")) == []
    gallery = Gallery("assets")
    sections = prediction_sections(Outcomes((*GOOD, *BAD, run("hidden", 0.2, 0.99))), gallery)
    assert sections[0] == "## Does drift predict refusals?"
    assert sum(line.startswith(f"| {name} |") for line in sections[1].splitlines() for name in PREDICTORS) == 3
    assert "- *cosine*, missed: `arithmetic/hidden/seed-0`" in sections[-1]
    assert len(gallery.drawings) == 1


def test_all_alike_has_no_correlation():
    assert np.isnan(Prediction.of("log-odds", [run(str(n), 1.0, 1.0) for n in range(4)]).rank[0])
