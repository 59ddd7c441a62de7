"""transformers' Trainer under the projection constraint."""

from __future__ import annotations

from transformers import Trainer

from procon.training.mixin import ProConMixin


class ProConTrainer(ProConMixin, Trainer):
    """transformers' Trainer with the constraint in its loss, and otherwise the Trainer that it extends.

    ``args`` is a :class:`procon.training.ProConConfig`. The rest is said at :class:`procon.training.ProConMixin`.
    """
