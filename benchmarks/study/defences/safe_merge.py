"""SafeMERGE: layers whose update leads away from alignment are merged with a safe adapter's (Djuhera et al. 2025,
"SafeMERGE: Preserving Safety Alignment in Fine-Tuned Large Language Models via Selective Layer-Wise Model Merging",
arXiv 2503.17239).

    where cos(dW, C dW) <= threshold:    A <- sqrt(1 - share) A + sqrt(share) A_safe,    B the same

with dW = B A and SafeLoRA's C, the step from the base to the aligned model. The safe adapter is trained on alignment
data, from where the user's begins.
"""

from __future__ import annotations

import copy
import logging
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import TrainOutput

from benchmarks.study.defences.safe_lora import SafeLoRATrainer, measure_updates
from benchmarks.study.defences.trainer import DefenceTrainer
from procon.errors import ProConError

logger = logging.getLogger(__name__)


class SafeMergeTrainer(SafeLoRATrainer):
    """Trains a safe adapter, then the user's, and merges them at the end of :meth:`train`; checkpoints hold the user's.

    Args:
        base: the model before it was aligned, or its folder or hub name.
        alignment_dataset: tokenised as ``train_dataset`` is: malicious prompts with refusals.
        threshold: cosine up to which a layer is merged.
        share: of the safe adapter in a merged layer, between 0 and 1.
        alignment_steps: optimiser steps that the safe adapter is trained for.

    Attributes:
        cosines: cosine of each layer before the merge, after :meth:`train`.

    Raises:
        ProConError: as SafeLoRA; for settings that are no such numbers; and on resuming.
    """

    def __init__(
        self,
        *args: Any,
        base: PreTrainedModel | str | Path,
        alignment_dataset: Dataset,
        threshold: float = 0.35,
        share: float = 0.2,
        alignment_steps: int = 40,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, base=base, threshold=threshold, **kwargs)
        if not (0 < share < 1 and alignment_steps >= 1):
            raise ProConError(
                f"share and alignment_steps are {share:g} and {alignment_steps}: give a share between 0 and 1, and 1 "
                "or more steps"
            )
        self.alignment_dataset, self.share, self.alignment_steps = alignment_dataset, share, alignment_steps

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        if resume_from_checkpoint:
            raise ProConError("SafeMergeTrainer cannot resume, as checkpoints lack the safe adapter: start afresh")
        safe = self._train_safe_adapter()
        output = DefenceTrainer.train(self, None, *args, **kwargs)
        self._merge(safe)
        return output

    def _train_safe_adapter(self) -> dict[nn.Parameter, Tensor]:
        """Its weights, by the parameter that they belong to; the model is as it was afterwards, and so is chance."""
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        start = [parameter.detach().clone() for parameter in trained]
        args = copy.copy(self.args)
        args.max_steps, args.report_to = self.alignment_steps, []
        # Nothing of it is kept, measured or published.
        args.save_strategy = args.eval_strategy = "no"
        args.load_best_model_at_end = args.push_to_hub = False
        with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng():
            args.output_dir = folder
            Trainer(self.model, args, train_dataset=self.alignment_dataset, data_collator=self.data_collator).train()
        safe = {parameter: parameter.detach().clone() for parameter in trained}
        with torch.no_grad():
            for parameter, weights in zip(trained, start, strict=True):
                parameter.copy_(weights)
        return safe

    @torch.no_grad()
    def _merge(self, safe: dict[nn.Parameter, Tensor]) -> None:
        user, other = (1 - self.share) ** 0.5, self.share**0.5
        for name, update in measure_updates(self.model, self.model, self._load_base()):
            self.cosines[name] = update.cosine
            if update.cosine <= self.threshold:
                for factor in (update.a, update.b):
                    factor.copy_(user * factor + other * safe[factor])
        count = sum(cosine <= self.threshold for cosine in self.cosines.values())
        logger.info("SafeMERGE merged %d of %d layers", count, len(self.cosines))
