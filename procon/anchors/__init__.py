"""Anchors: the projections of every training token at the start, recorded once and found again by content.

In: the model that training starts from, its directions, batches of the training data.
Out: a store of projections, and batches that carry theirs.
May import: ``directions``, ``chat``, ``models``, ``ops`` and the leaves; not ``data``, which loads ``datasets``.
"""

from procon.anchors.collator import AnchoredCollator
from procon.anchors.store import Anchors, fingerprint

__all__ = ["AnchoredCollator", "Anchors", "fingerprint"]
