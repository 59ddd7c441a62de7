"""lm-evaluation-harness on a model that is loaded already: general skills beside refusals.

It is a package of its own (extra ``lm-eval``); nothing of it is imported before it is asked for.
"""

from __future__ import annotations

import importlib
import json
import os
from importlib.metadata import version
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from procon.errors import ProConError, require_extra


class HarnessTasks:
    """Tasks of the harness, found by their names before the work.

    Args:
        names: names, groups or patterns as the harness knows them, or ``.yaml`` files of tasks of one's own, joined by
            commas.

    Raises:
        ProConError: if the harness is not installed, or has no such task.
    """

    def __init__(self, names: str) -> None:
        self.names = [name.strip() for name in names.split(",") if name.strip()]
        if not self.names:
            raise ProConError(f"lm_eval is {names!r:.40}: name tasks of lm-evaluation-harness, joined by commas")
        require_extra("lm-eval", "an evaluation by lm-evaluation-harness")
        files = [name for name in self.names if name.endswith((".yaml", ".yml"))]
        for file in files:
            if not os.path.isfile(file):
                raise ProConError(f"lm_eval task file {file!r} does not exist: check the path")
        # To index the harness's own tasks takes seconds.
        self._manager: Any = _module("lm_eval.tasks").TaskManager(include_defaults=len(files) < len(self.names))
        for name in self.names:
            if name not in files and not self._manager.match_tasks([name]):
                raise ProConError(f"lm-evaluation-harness has no task {name!r:.60}: see `lm_eval ls tasks`")

    def run(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, *, batch_size: int = 8, limit: int = 0
    ) -> dict[str, Any]:
        """Results per task, with the harness's version and the tasks' own; for :attr:`Evaluation.lm_eval`.

        Prompts are as the harness has them by default, without a chat template.

        Args:
            limit: documents per task; 0 for all.

        Raises:
            ProConError: if a task cannot be run.
        """
        try:
            wrapped = _module("lm_eval.models.huggingface").HFLM(
                pretrained=model, tokenizer=tokenizer, batch_size=batch_size
            )
            found = _module("lm_eval").simple_evaluate(
                wrapped,
                tasks=list(self.names),
                task_manager=self._manager,
                limit=limit or None,
                log_samples=False,
                bootstrap_iters=0 if limit else 1000,
            )
        except Exception as error:  # of the tasks, their data, or the harness
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise ProConError(
                f"lm_eval tasks {', '.join(self.names)!r:.100} cannot be run ({reason:.200}): try them "
                "with lm_eval itself"
            ) from error
        parts = {name: found.get(name, {}) for name in ("results", "versions", "n-shot", "n-samples")}
        return _plain({"lm_eval": version("lm_eval"), "tasks": self.names, "limit": limit or None, **parts})


def _module(name: str) -> Any:
    """A module of the harness, which type checkers need not find."""
    return importlib.import_module(name)


def _plain(results: dict[str, Any]) -> dict[str, Any]:
    """As standard JSON has it: numbers of numpy's become Python's, NaN becomes none, and what is neither a text."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(key): plain(part) for key, part in value.items()}
        if isinstance(value, list | tuple):
            return [plain(part) for part in value]
        if hasattr(value, "item"):
            value = value.item()
        if isinstance(value, float) and value != value:
            return None
        return value if isinstance(value, str | int | float | bool | None) else str(value)

    found = plain(results)
    json.dumps(found, allow_nan=False)
    return found
