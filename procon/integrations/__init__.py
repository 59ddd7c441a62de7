"""ProCon inside other people's training frameworks; axolotl's plugin is in ``procon.integrations.axolotl``.

In: what the framework hands over: a model, its forwards, a Trainer's callbacks, keys of a YAML file.
Out: the framework's own training, constrained.
May import: ``training``, ``data`` and the rooms below them.
"""

from procon.errors import require_extra

__extra__ = require_extra("train", __name__)

from procon.integrations.callback import ProConCallback
from procon.integrations.forward import ConstrainedForward, constrained_by

__all__ = ["ConstrainedForward", "ProConCallback", "constrained_by"]
