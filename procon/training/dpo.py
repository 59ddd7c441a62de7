"""TRL's DPOTrainer under the projection constraint."""

from __future__ import annotations

from procon.errors import require_extra

__extra__ = require_extra("trl", __name__)

from dataclasses import dataclass

from trl import DPOConfig, DPOTrainer

from procon.settings import AnchorSource
from procon.training.config import ProConArguments
from procon.training.reference import PairedReferenceMixin


@dataclass
class ProConDPOConfig(ProConArguments, DPOConfig):
    """TRL's DPOConfig with the settings of the constraint; training tokens have anchors only if it says so."""

    procon_anchors: AnchorSource = "none"


class ProConDPOTrainer(PairedReferenceMixin, DPOTrainer):
    """TRL's DPOTrainer with the constraint in its loss, and otherwise the DPOTrainer that it extends::

        trainer = ProConDPOTrainer("model", args=ProConDPOConfig(), train_dataset=pairs, peft_config=LoraConfig())

    Live anchors come from the forward of the reference model that DPO makes anyway, and constrain chosen and rejected
    sequences alike. ``args`` is a :class:`ProConDPOConfig`. The rest is said at :class:`procon.training.ProConMixin`.
    """

    _log_probabilities = ("ref_chosen_logps", "ref_rejected_logps")
