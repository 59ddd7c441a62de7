"""The method: one object, and the terms that its loss is a sum of. Every trainer and loop holds the same object.

In: a model that is about to train, its tokenizer, settings, and batches of the training data.
Out: what each micro-batch adds to the loss, what a checkpoint must have, and what the constraint did.
May import: ``anchors``, ``constraint``, ``directions`` and the rooms below them; no trainer.
"""

from procon.errors import require_extra

__extra__ = require_extra("train", __name__)

from procon.method.probes import Probes, ProbeTerm
from procon.method.procon import ProCon, check_batches, make_terms, makes_batches, once_through
from procon.method.term import Run, Step, Term
from procon.method.tokens import TokenTerm

__all__ = [
    "ProCon",
    "ProbeTerm",
    "Probes",
    "Run",
    "Step",
    "Term",
    "TokenTerm",
    "check_batches",
    "make_terms",
    "makes_batches",
    "once_through",
]
