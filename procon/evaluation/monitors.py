"""Do monitors still read a model after it was trained? AUROC and scores of linear probes, before and after."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from procon.chat import ContrastPrompts
from procon.directions import Directions, auroc
from procon.directions import project_last_token as project_on_all
from procon.errors import ProConError
from procon.models import find_decoder
from procon.settings import LAST, ChatSettings


@dataclass(frozen=True)
class MonitorReading:
    """What one monitor reads of one model, at the last token of labelled prompts; NaN where it has no vector.

    Its score at a block is ``<vector, x> + bias`` with the vector as it was given.

    Attributes:
        auroc: ``[L]`` fp32, probability that a prompt with the concept scores higher than one without (0.5 is chance).
        positive, negative: ``[L]`` fp32, mean score of the prompts with the concept, and of those without.
        caught, false_alarms: ``[L]`` fp32, share of the prompts with the concept, and of those without, whose score is
            above the threshold; NaN for a monitor without a threshold.
        scores: ``[n, L]`` fp32 of each prompt with the concept, and ``[m, L]`` of each without, for intervals, curves
            and other thresholds.
        last_output: whether the last row is that of the last block's output.
    """

    auroc: Tensor
    positive: Tensor
    negative: Tensor
    caught: Tensor
    false_alarms: Tensor
    scores: tuple[Tensor, Tensor]
    last_output: bool = False


@dataclass(frozen=True)
class MonitorChange:
    """One monitor before a training and after it; tensors are ``[L]``, NaN where the monitor has no vector.

    Attributes:
        before, after: what it reads.
        positive_shift, negative_shift: change of the mean score of the prompts with the concept, and of those without,
            in units of the distance between the two before training: -1 on the positive side means that they now score
            as the others did.
    """

    before: MonitorReading
    after: MonitorReading
    positive_shift: Tensor = field(init=False)
    negative_shift: Tensor = field(init=False)

    def __post_init__(self) -> None:
        distance = (self.before.positive - self.before.negative).abs()
        for side in ("positive", "negative"):
            shift = (getattr(self.after, side) - getattr(self.before, side)) / distance
            object.__setattr__(self, f"{side}_shift", shift)

    @property
    def best(self) -> int:
        """The row at which the monitor separated the prompts best before training: where one would use it."""
        return int(self.before.auroc.nan_to_num(nan=-1.0).argmax())

    def rows(self, name: str) -> list[dict[str, Any]]:
        """One dict for each block at which there is a vector, for reports and JSON.

        Its keys are ``monitor``, ``block`` (an index, or ``"last"`` for the last block's output), ``best``, and the
        figures before and after; those that are not known are None.
        """
        columns = {
            "auroc_before": self.before.auroc,
            "auroc_after": self.after.auroc,
            "positive_shift": self.positive_shift,
            "negative_shift": self.negative_shift,
            "caught_before": self.before.caught,
            "caught_after": self.after.caught,
            "false_alarms_before": self.before.false_alarms,
            "false_alarms_after": self.after.false_alarms,
        }
        there = (~self.before.auroc.isnan()).nonzero().flatten().tolist()
        last = len(self.before.auroc) - 1 if self.before.last_output else None
        return [
            {"monitor": name, "block": LAST if row == last else row, "best": row == self.best}
            | {key: _finite_or_none(float(values[row])) for key, values in columns.items()}
            for row in there
        ]


def measure_monitors(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    monitors: Directions,
    prompts: ContrastPrompts | Mapping[str, ContrastPrompts],
    *,
    chat: ChatSettings | None = None,
    batch_size: int = 32,
    progress: bool = True,
) -> dict[str, MonitorReading]:
    """What each monitor reads of ``model``, by its name.

    Args:
        monitors: linear probes with bias and threshold, or any other directions.
        prompts: labelled ones, those with the concept where the malicious ones stand; for all monitors, or by name.

    Raises:
        ProConError: if the monitors are of another model's shape, or one of them has no prompts.
    """
    monitors.check_fits(find_decoder(model))
    by_name = prompts if isinstance(prompts, Mapping) else dict.fromkeys(monitors.names, prompts)
    missing = [name for name in monitors.names if name not in by_name]
    if missing:
        raise ProConError(f"monitor {missing[0]!r} has no prompts: give labelled ones for each of the monitors")
    readings = {}
    for number, name in enumerate(monitors.names):
        one = monitors.vectors[:, number : number + 1]
        scores = [
            monitors.length[:, number]
            * project_on_all(model, tokenizer, one, side, chat=chat, batch_size=batch_size, progress=progress)[..., 0]
            + monitors.bias[:, number]
            for side in (by_name[name].malicious, by_name[name].benign)
        ]
        there = one[:, 0].any(-1)
        if not all(torch.isfinite(side[:, there]).all() for side in scores):
            raise ProConError(f"scores of monitor {name!r} are NaN or infinite: load the model in bfloat16 or float32")
        reading = _reading(scores[0], scores[1], there, monitors.threshold[:, number])
        readings[name] = replace(reading, last_output=monitors.last_output)
    return readings


def compare_monitors(
    before: Mapping[str, MonitorReading], after: Mapping[str, MonitorReading]
) -> dict[str, MonitorChange]:
    """How each monitor has changed, by its name, between two results of :func:`measure_monitors`."""
    return {name: MonitorChange(before[name], after[name]) for name in before}


def _reading(positive: Tensor, negative: Tensor, there: Tensor, threshold: Tensor) -> MonitorReading:
    """Of scores ``[n, L]`` and ``[m, L]``."""

    def known(values: Tensor, where: Tensor) -> Tensor:
        return torch.where(where, values, torch.nan)

    set_there = there & ~threshold.isnan()
    return MonitorReading(
        auroc=known(auroc(positive, negative), there),
        positive=known(positive.mean(0), there),
        negative=known(negative.mean(0), there),
        caught=known((positive > threshold).float().mean(0), set_there),
        false_alarms=known((negative > threshold).float().mean(0), set_there),
        scores=(known(positive, there), known(negative, there)),
    )


def _finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None
