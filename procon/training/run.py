"""What the method knows of the Trainer that it is part of."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from procon.anchors import LiveAnchors
from procon.method import Run
from procon.settings import ChatSettings
from procon.training.output import output_folder

if TYPE_CHECKING:
    from procon.training.mixin import ProConMixin


class TrainerRun(Run):
    """A training by transformers' Trainer; asked as it goes, since models are wrapped and loaded on the way."""

    def __init__(self, trainer: ProConMixin, chat: ChatSettings | None) -> None:
        self._trainer = trainer
        self.chat = chat or ChatSettings()

    @property
    def model(self) -> nn.Module:
        return cast(nn.Module, self._trainer.model)

    @property
    def tokenizer(self) -> Any:
        """``processing_class``, or the tokenizer that a processor of images too has."""
        found = self._trainer.processing_class
        return getattr(found, "tokenizer", found)

    @property
    def folder(self) -> Path:
        return output_folder(self._trainer.args)

    @property
    def progress(self) -> bool:
        return self._trainer.is_world_process_zero() and not self._trainer.args.disable_tqdm

    @property
    def device(self) -> torch.device:
        return self._trainer.args.device

    @property
    def groups(self) -> int:
        return self._trainer.args.world_size // self._trainer.get_tp_size()

    @property
    def is_loaded_in_parts(self) -> bool:
        return getattr(self._trainer, "is_distributed_loading_by_transformers", False)

    @property
    def reference(self) -> nn.Module | None:
        return self._trainer._reference_model

    def autocast(self) -> AbstractContextManager[Any]:
        return self._trainer.compute_loss_context_manager()

    def total(self, tensor: Tensor) -> Tensor:
        """Each rank of tensor parallelism has the sum of the whole batch."""
        return cast(Tensor, self._trainer.accelerator.reduce(tensor / self._trainer.get_tp_size(), "sum"))

    def project(self, live: LiveAnchors, batch: dict[str, Any]) -> Tensor:
        return self._trainer._project_live(live, batch)
