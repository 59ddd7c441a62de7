"""Anchors: the projections at the start of training. Recorded once for every training token and found again by content;
live, from a forward of the starting model on the batch; or of a few fixed prompts, the probes.

In: the model that training starts from, its directions, and batches of the training data or prompts.
Out: projections, beside the tokens that they belong to.
May import: ``directions``, ``chat``, ``models``, ``ops`` and the leaves; not ``data``, which loads ``datasets``.
"""

from procon.errors import require_extra

__extra__ = require_extra("train", __name__)

from procon.anchors.collator import AnchoredCollator
from procon.anchors.live import LiveAnchors
from procon.anchors.probes import Probes
from procon.anchors.store import Anchors, fingerprint
from procon.anchors.token_mask import TokenMask

__all__ = ["AnchoredCollator", "Anchors", "LiveAnchors", "Probes", "TokenMask", "fingerprint"]
