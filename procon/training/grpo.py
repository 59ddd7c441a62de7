"""TRL's GRPOTrainer under the projection constraint."""

from __future__ import annotations

from procon.errors import require_extra

__extra__ = require_extra("trl", __name__)

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from trl import GRPOConfig, GRPOTrainer

from procon.anchors import LiveAnchors
from procon.errors import ProConError
from procon.method.tokens import TARGET
from procon.settings import AnchorSource
from procon.training.config import ProConArguments
from procon.training.reference import ReferenceMixin


@dataclass
class ProConGRPOConfig(ProConArguments, GRPOConfig):
    """TRL's GRPOConfig with the settings of the constraint; training tokens have anchors only if it says so."""

    procon_anchors: AnchorSource = "none"


class ProConGRPOTrainer(ReferenceMixin, GRPOTrainer):
    """TRL's GRPOTrainer with the constraint in its loss, and otherwise the GRPOTrainer that it extends.

    Live anchors hold prompts and completions to what they were under the starting model. With ``beta`` above 0 they
    come from the forward of the reference model that GRPO makes anyway; with ``beta`` 0 from one of their own, once for
    each completion. As with GRPO's own loss, an optimiser step is the mean over its micro-batches and ranks, here of
    each one's mean over its constrained tokens. ``args`` is a :class:`ProConGRPOConfig`. The rest is said at
    :class:`procon.training.ProConMixin`.

    Raises:
        ProConError: for recorded anchors, as tokens are generated while training.
    """

    #: Of the completions that were generated last, if the reference model has run on them.
    _of_reference: Tensor | None = None

    def _refuse(self) -> None:
        super()._refuse()
        if self.procon.settings.anchors == "recorded":
            raise ProConError(
                "GRPO generates the tokens that it trains on, so they cannot be recorded beforehand: take "
                "procon_anchors 'live', or 'none' and the probes"
            )

    def get_train_dataloader(self) -> DataLoader:
        # Prompts alone: what is constrained is generated from them.
        return GRPOTrainer.get_train_dataloader(self)

    def _prepare_inputs(self, inputs: Any) -> Any:
        return GRPOTrainer._prepare_inputs(self, inputs)

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        self._of_reference = None
        output = super()._generate_and_score_completions(inputs)
        live = self._live
        if live is None or not self.model.training:
            return output
        ids = torch.cat([output["prompt_ids"], output["completion_ids"]], 1)
        attention = torch.cat([output["prompt_mask"], output["completion_mask"]], 1)
        anchors, self._of_reference = self._of_reference, None
        if anchors is None:
            size = self.args.per_device_train_batch_size
            parts = zip(ids.split(size), attention.split(size), strict=True)
            with self.accelerator.autocast():
                anchors = torch.cat([live({"input_ids": i, "attention_mask": a}) for i, a in parts])
        return {**output, TARGET[0]: anchors, TARGET[1]: self._mask(output)}

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        # TRL trains on the same batch in each of num_iterations, and the anchors are taken out of what is handed on.
        return super().compute_loss(model, dict(inputs), *args, **kwargs)

    def _get_per_token_logps_and_entropies(self, model: nn.Module, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        run = super()._get_per_token_logps_and_entropies
        live = self._live
        if live is None or torch.is_grad_enabled() or not self._is_reference(model):
            return run(model, input_ids, *args, **kwargs)
        found, self._of_reference = live.of(lambda: run(model, input_ids, *args, **kwargs), len(input_ids))
        return found

    @property
    def _live(self) -> LiveAnchors | None:
        return None if self.procon.tokens is None else self.procon.tokens.live

    def _mask(self, output: dict[str, Tensor]) -> Tensor:
        """``[B, T]`` fp32: the constrained tokens of prompts and completions."""
        prompt, completion = output["prompt_mask"].float(), output["completion_mask"].float()
        if self.procon.settings.scope == "response":
            prompt = torch.zeros_like(prompt)
        elif self.procon.settings.scope == "prompt":
            completion = torch.zeros_like(completion)
        return torch.cat([prompt, completion], 1)

    def _count_constrained(self, batches: list[dict[str, Any]]) -> None:
        return None  # what an optimiser step constrains is not generated yet
