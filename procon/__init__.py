"""ProCon: fine-tune a chat model without it forgetting how to refuse.

Names are imported on first use, so ``from procon import constrain`` loads neither transformers nor Triton.
"""

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from procon.version import __version__


def _mount_kernels() -> None:
    """In a source tree ``kernels/`` lies beside this package, not in it; that one folder becomes ``procon.kernels``.

    It has no ``__init__.py``, so that ``import kernels`` in a source tree finds Hugging Face's package of that name.
    """
    folder = Path(__file__).resolve().parents[1] / "kernels"
    if "procon.kernels" in sys.modules or Path(__file__).with_name("kernels").is_dir() or not folder.is_dir():
        return
    spec = ModuleSpec("procon.kernels", None, is_package=True)
    spec.submodule_search_locations = [str(folder)]
    sys.modules["procon.kernels"] = globals()["kernels"] = module_from_spec(spec)  # as an import of a submodule sets it


_mount_kernels()

#: Where each public name is: the door of a room, or a module that a door leaves out for what it needs.
_HOME = {
    "project": "ops",
    "projection_penalty": "ops",
    "constrain": "ops",
    "rms_norm_constrain": "ops",
    "ProConError": "errors",
    "Directions": "directions",
    "Anchors": "anchors",
    "AnchoredCollator": "anchors",
    "ProCon": "method",
    "Probes": "method",
    "ProjectionConstraint": "constraint",
    "constrained_tokens": "constraint",
    "AlphaSchedule": "schedule",
    "ChatSettings": "settings",
    "ProConSettings": "settings",
    "ProConConfig": "training",
    "ProConMixin": "training",
    "ProConTrainer": "training",
    "protect": "training",
    "DriftCallback": "training",
    "EvaluationCallback": "training",
    "ProConSFTConfig": "training.sft",
    "ProConSFTTrainer": "training.sft",
}

__all__ = [
    "AlphaSchedule",
    "AnchoredCollator",
    "Anchors",
    "ChatSettings",
    "Directions",
    "DriftCallback",
    "EvaluationCallback",
    "ProCon",
    "ProConConfig",
    "ProConError",
    "ProConMixin",
    "ProConSFTConfig",
    "ProConSFTTrainer",
    "ProConSettings",
    "ProConTrainer",
    "Probes",
    "ProjectionConstraint",
    "__version__",
    "constrain",
    "constrained_tokens",
    "project",
    "projection_penalty",
    "protect",
    "rms_norm_constrain",
]

if TYPE_CHECKING:
    from procon.anchors import AnchoredCollator as AnchoredCollator
    from procon.anchors import Anchors as Anchors
    from procon.constraint import ProjectionConstraint as ProjectionConstraint
    from procon.constraint import constrained_tokens as constrained_tokens
    from procon.directions import Directions as Directions
    from procon.errors import ProConError as ProConError
    from procon.method import Probes as Probes
    from procon.method import ProCon as ProCon
    from procon.ops import constrain as constrain
    from procon.ops import project as project
    from procon.ops import projection_penalty as projection_penalty
    from procon.ops import rms_norm_constrain as rms_norm_constrain
    from procon.schedule import AlphaSchedule as AlphaSchedule
    from procon.settings import ChatSettings as ChatSettings
    from procon.settings import ProConSettings as ProConSettings
    from procon.training import DriftCallback as DriftCallback
    from procon.training import EvaluationCallback as EvaluationCallback
    from procon.training import ProConConfig as ProConConfig
    from procon.training import ProConMixin as ProConMixin
    from procon.training import ProConTrainer as ProConTrainer
    from procon.training import protect as protect
    from procon.training.sft import ProConSFTConfig as ProConSFTConfig
    from procon.training.sft import ProConSFTTrainer as ProConSFTTrainer


def __getattr__(name: str) -> Any:
    name = "Directions" if name == "RefusalDirections" else name  # as the paper calls them
    if name not in _HOME:
        raise AttributeError(f"module 'procon' has no attribute {name!r}")
    return getattr(import_module(f"procon.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
