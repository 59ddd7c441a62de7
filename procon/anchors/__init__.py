"""Anchors: the projections at the start of training. Recorded once for every training token and found again by content;
or live, from a forward of the starting model on the batch.

In: the model that training starts from, its directions, and batches of the training data.
Out: projections, beside the tokens that they belong to.
May import: ``directions``, ``chat``, ``models``, ``ops`` and the leaves; not ``data``, which loads ``datasets``.
"""

from procon.errors import require_extra

__extra__ = require_extra("train", __name__)

from procon.anchors.live import LiveAnchors
from procon.anchors.store import AnchoredCollator, Anchors, fingerprint

__all__ = ["AnchoredCollator", "Anchors", "LiveAnchors", "fingerprint"]
