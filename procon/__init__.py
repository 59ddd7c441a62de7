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
_ROOMS = {
    "anchors": ("AnchoredCollator", "Anchors"),
    "constraint": ("ProjectionConstraint", "constrained_tokens"),
    "directions": ("Directions",),
    "errors": ("ProConError",),
    "method": ("ProCon", "Probes"),
    "ops": ("constrain", "project", "projection_penalty", "rms_norm_constrain"),
    "schedule": ("AlphaSchedule",),
    "settings": ("ChatSettings", "ProConSettings"),
    "training": ("DriftCallback", "EvaluationCallback", "ProConConfig", "ProConMixin", "ProConTrainer", "protect"),
    "training.sft": ("ProConSFTConfig", "ProConSFTTrainer"),
}
_HOME = {name: room for room, names in _ROOMS.items() for name in names}

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
    from procon.anchors import AnchoredCollator, Anchors
    from procon.constraint import ProjectionConstraint, constrained_tokens
    from procon.directions import Directions
    from procon.errors import ProConError
    from procon.method import Probes, ProCon
    from procon.ops import constrain, project, projection_penalty, rms_norm_constrain
    from procon.schedule import AlphaSchedule
    from procon.settings import ChatSettings, ProConSettings
    from procon.training import DriftCallback, EvaluationCallback, ProConConfig, ProConMixin, ProConTrainer, protect
    from procon.training.sft import ProConSFTConfig, ProConSFTTrainer


def __getattr__(name: str) -> Any:
    name = "Directions" if name == "RefusalDirections" else name  # as the paper calls them
    if name not in _HOME:
        raise AttributeError(f"module 'procon' has no attribute {name!r}")
    return getattr(import_module(f"procon.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
