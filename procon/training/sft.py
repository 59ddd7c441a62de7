"""TRL's SFTTrainer under the projection constraint."""

from __future__ import annotations

from procon.errors import require_extra

__extra__ = require_extra("trl", __name__)

from dataclasses import dataclass

from trl import SFTConfig, SFTTrainer

from procon.training.config import ProConArguments
from procon.training.trainer import ProConMixin


@dataclass
class ProConSFTConfig(ProConArguments, SFTConfig):
    """TRL's SFTConfig with the settings of the constraint."""


class ProConSFTTrainer(ProConMixin, SFTTrainer):
    """TRL's SFTTrainer with the constraint in its loss, and otherwise the SFTTrainer that it extends::

        trainer = ProConSFTTrainer(
            "model", ProConSFTConfig(procon_schedule="procon_wu:1@4ep"), train_dataset=dataset, peft_config=LoraConfig()
        )

    Packing, padding-free batches, completion and assistant masks: the constrained tokens follow the labels TRL makes.
    ``args`` is a :class:`ProConSFTConfig`. The rest is said at :class:`procon.training.ProConMixin`.
    """
