"""Evaluation within training, and the best checkpoint, which a model may be in place of the last one."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, cast

from torch import nn

from procon.errors import ProConError
from procon.method.ranks import on_main
from procon.method.record import read_record
from procon.models import keep_quantised
from procon.training.checkpoints import check_files, check_no_others
from procon.training.step_times import TimedMixin

logger = logging.getLogger(__name__)

#: Beginnings of the names of what a checkpoint's weights are in; of FSDP's folder, and of DeepSpeed's.
_WEIGHTS = ("adapter_model", "model", "pytorch_model", "global_step")


class BestMixin(TimedMixin):
    """Before any subclass of transformers' Trainer: with ``load_best_model_at_end``, the record says which model it is.

    The measured facts of that record are then those of the best checkpoint, not of the steps after it.
    """

    _best: dict[str, Any] | None = None

    @property
    def best(self) -> dict[str, Any] | None:
        """Step, metric and value of the checkpoint that the model was set back to; None if it is the last."""
        if self._best is None:
            return None
        state = self.state
        name = str(self.args.metric_for_best_model)
        metric = name if name.startswith("eval_") else f"eval_{name}"
        return {"step": state.best_global_step, "metric": metric, "value": state.best_metric}

    @property
    def best_did(self) -> dict[str, Any] | None:
        """What was measured up to that checkpoint."""
        return dict(self._best["did"]) if self._best and "did" in self._best else None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._best = None
        output = super().train(*args, **kwargs)
        if self.args.load_best_model_at_end and self._best is None:
            logger.warning(
                "load_best_model_at_end is set, and no checkpoint was evaluated, so the model is that of the last step"
            )
        return output

    def prediction_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        keep_quantised(model)
        return super().prediction_step(model, *args, **kwargs)

    def _load_best_model(self) -> None:
        folder = Path(cast(str, self.state.best_model_checkpoint))
        if not any(path.name.startswith(_WEIGHTS) for path in folder.glob("*")):
            raise ProConError(
                f"the best checkpoint {str(folder)!r} is not on this host, so the model would stay the last one: set "
                "save_on_each_node, or load_best_model_at_end to false"
            )
        self._best = on_main(lambda: _checked(folder))
        super()._load_best_model()


def _checked(folder: Path) -> dict[str, Any]:
    """The record of a checkpoint whose weights are as they were written; what only resuming needs is not looked at."""
    record = read_record(folder) or {}
    if files := record.get("files"):
        check_files(folder, files, _WEIGHTS)
        check_no_others(folder, files)
    return record
