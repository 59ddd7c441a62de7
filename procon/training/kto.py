"""TRL's KTOTrainer under the projection constraint."""

from __future__ import annotations

from procon.errors import require_extra

__extra__ = require_extra("trl", __name__)

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trl import KTOConfig, KTOTrainer
else:
    try:
        from trl import KTOConfig, KTOTrainer
    except ImportError:  # before TRL called its KTO stable
        from trl.experimental.kto import KTOConfig, KTOTrainer

from procon.settings import AnchorSource
from procon.training.config import ProConArguments
from procon.training.reference import PairedReferenceMixin


@dataclass
class ProConKTOConfig(ProConArguments, KTOConfig):
    """TRL's KTOConfig with the settings of the constraint; training tokens have anchors only if it says so."""

    procon_anchors: AnchorSource = "none"


class ProConKTOTrainer(PairedReferenceMixin, KTOTrainer):
    """TRL's KTOTrainer with the constraint in its loss, and otherwise the KTOTrainer that it extends.

    Live anchors come from the forward of the reference model that KTO makes anyway, and constrain desirable and
    undesirable sequences alike. ``args`` is a :class:`ProConKTOConfig`. The rest is said at
    :class:`procon.training.ProConMixin`.
    """

    _log_probabilities = ("ref_logps", "ref_KL_logps")
