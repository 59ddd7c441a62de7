"""The paper's figures on the same comparisons: arXiv 2509.06795v1, LLaMA2-7B, average over six sets of attacks."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PaperFigure:
    """A row of one of its tables.

    Attributes:
        asr: attack success rate in percent, the share of replies without a refusal keyword.
        task: accuracy in percent.
        table: its name.
    """

    asr: float
    task: float
    table: str

    @property
    def refusal(self) -> float:
        """In percent."""
        return 100 - self.asr


def _rows(table: str, rows: dict[str, tuple[float, float]]) -> dict[str, PaperFigure]:
    return {method: PaperFigure(asr, task, table) for method, (asr, task) in rows.items()}


#: Section IV-B1: benign fine-tuning.
_BENIGN = _rows(
    "Table I",
    {
        "start": (6.12, 41.60),
        "plain": (61.18, 66.00),
        "safe_lora": (42.64, 57.20),
        "safe": (35.27, 66.80),
        "sppft": (47.42, 59.60),
        "procon_s": (28.82, 66.20),
        "procon_wu": (20.49, 66.40),
        "procon_s_safe": (17.00, 66.80),
        "procon_wu_safe": (12.88, 67.00),
    },
)

#: Section IV-B2: 100 compliant answers to malicious instructions among the training data.
_POISONED = _rows(
    "Table III",
    {
        "plain": (67.06, 66.60),
        "safe_lora": (38.70, 64.40),
        "safe": (46.43, 65.00),
        "sppft": (76.21, 55.80),
        "procon_s": (55.97, 65.60),
        "procon_wu": (39.82, 66.80),
        "procon_s_safe": (21.55, 66.40),
        "procon_wu_safe": (15.21, 66.60),
    },
)

#: A second benign task, GSM8K; its task column is the accuracy there.
_SECOND_TASK = _rows(
    "Table IV",
    {
        "start": (6.12, 21.80),
        "plain": (51.40, 32.20),
        "safe_lora": (33.64, 28.80),
        "safe": (40.55, 31.80),
        "sppft": (48.97, 26.40),
        "procon_wu_safe": (9.46, 32.00),
    },
)

#: Section V-B: ProCon_s on the last block alone. Its other rows are those of Table I.
_LAST_BLOCK = _rows("Table V", {"last_block": (48.33, 66.80)})

#: By job, then by method.
PAPER: dict[str, dict[str, PaperFigure]] = {
    "arithmetic": {**_BENIGN, **_LAST_BLOCK},
    "poisoned": _POISONED,
    "extraction": _SECOND_TASK,
}
