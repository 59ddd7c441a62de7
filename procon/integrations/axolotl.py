"""axolotl's plugin: the constraint by keys of the YAML file::

    plugins:
      - procon.integrations.axolotl.ProConPlugin
    procon_directions: directions.safetensors   # if not given: extracted from the model as training starts
    procon_alpha: 0.1                           # or procon_schedule: procon_wu:1@4ep

The keys are the settings of :class:`procon.training.ProConArguments`; ``procon_alpha: 0.1`` is short for
``procon_schedule: procon_s:0.1``. Supervised fine-tuning, padded, packed or flattened, is constrained; other trainings
are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, get_type_hints

from procon.errors import ProConError
from procon.schedule import AlphaSchedule
from procon.settings import check_alpha

# axolotl goes on without a plugin that raises ImportError, which here would be an unconstrained training.
try:
    from axolotl.integrations.base import BasePlugin
    from pydantic import create_model

    from procon.training import ProConArguments, ProConMixin
    from procon.training.config import check_probe_file
except ImportError as error:
    raise ProConError(f"the axolotl plugin cannot be loaded: {error}") from error

#: Settings that are texts, and that a YAML file may have as numbers or lists.
_TEXTS = ("procon_schedule", "procon_blocks")

#: Keys of axolotl that make it train by another loss or on split sequences, and what to do about them.
_REFUSED = {
    "rl": "remove rl: preference and reward losses are not constrained",
    "orpo_alpha": "remove orpo_alpha: preference losses are not constrained",
    "reward_model": "remove reward_model: its loss is not constrained",
    "process_reward_model": "remove process_reward_model: its loss is not constrained",
    "trainer_cls": "remove trainer_cls, or put ProConMixin before that class and drop the plugin",
    "use_pose": "remove use_pose: positions with gaps do not separate samples",
}


#: The keys that the plugin adds to axolotl's YAML file: the settings, as a YAML file has them.
_KINDS: dict[str, Any] = {"procon_directions": str, "procon_alpha": float, **get_type_hints(ProConArguments)}
_KINDS |= dict.fromkeys(_TEXTS, str | float | list[int | float | str])
_FIELDS: dict[str, Any] = {name: (kind | None, None) for name, kind in _KINDS.items()}
AxolotlKeys: Any = create_model("AxolotlKeys", **_FIELDS)


@dataclass
class ProConAxolotlArguments(ProConArguments):
    """What the plugin adds to axolotl's training arguments."""

    procon_directions: str | None = field(
        default=None, metadata={"help": "File of refusal directions; extracted as training starts if not given."}
    )


class ProConPlugin(BasePlugin):
    """Has axolotl train by :class:`procon.integrations.axolotl_trainer.ProConAxolotlTrainer`.

    If ``procon_schedule`` is 0 throughout, it changes nothing. Gradient checkpointing that the file asks for is made
    the non-reentrant kind: under axolotl's own choice the constraint would lose its gradient.

    Raises:
        ProConError: before the model is loaded, for a key that is misspelt, and if the constraint could not act; as
            the trainer is made, if another plugin brought its own.
    """

    def register(self, cfg: dict[str, Any]) -> None:
        """Check the YAML file as it was written."""
        if not _is_asked_for(cfg):
            return
        for name in cfg:
            if name.startswith("procon_") and name not in AxolotlKeys.model_fields:
                raise ProConError(f"there is no key {name}: the keys are {', '.join(AxolotlKeys.model_fields)}")
        arguments = _arguments(cfg)
        settings = arguments.procon_settings()
        if not AlphaSchedule.parse(settings.schedule).active:
            return
        check_probe_file(settings)
        for name, remedy in _REFUSED.items():
            if cfg.get(name):
                raise ProConError(f"{name} is set, under which the constraint could not act: {remedy}")
        if cfg.get("pretraining_dataset") and settings.anchors == "recorded":
            raise ProConError(
                "pretraining_dataset is set, and a streamed one has no anchors recorded beforehand: use datasets, or "
                "set procon_anchors to live or none"
            )
        if (cfg.get("context_parallel_size") or 1) > 1:
            raise ProConError(
                f"context_parallel_size is {cfg['context_parallel_size']}, which splits samples over ranks after their "
                "anchors were looked up: set it to 1"
            )
        checkpointing = cfg.get("gradient_checkpointing_kwargs") or {}
        if cfg.get("gradient_checkpointing"):
            if checkpointing.get("use_reentrant"):
                raise ProConError(
                    "gradient_checkpointing_kwargs has use_reentrant: true, under which the constraint would lose its "
                    "gradient: set it to false"
                )
            cfg["gradient_checkpointing_kwargs"] = {**checkpointing, "use_reentrant": False}

    def get_input_args(self) -> str:
        return f"{__name__}.{AxolotlKeys.__name__}"

    def get_training_args_mixin(self) -> str:
        return f"{__name__}.{ProConAxolotlArguments.__name__}"

    def get_training_args(self, cfg: Mapping[str, Any]) -> dict[str, Any] | None:
        return _settings(cfg) if _is_asked_for(cfg) else None

    def pre_model_load(self, cfg: Mapping[str, Any]) -> None:
        """Check the settings that axolotl derived from the YAML file."""
        if self._constrains(cfg) and cfg.get("sample_packing") and not cfg.get("attn_decontaminates_packing"):
            raise ProConError(
                f"sample_packing with attn_implementation {cfg.get('attn_implementation')!r} lets samples see those "
                "packed before them, and anchors belong to one sample: set attn_implementation to sdpa, or to a "
                "flash_attention"
            )

    def get_trainer_cls(self, cfg: Mapping[str, Any]) -> type[ProConMixin] | None:
        if not self._constrains(cfg):
            return None
        # Here, as axolotl has by now patched transformers for this training.
        from procon.integrations.axolotl_trainer import ProConAxolotlTrainer

        return ProConAxolotlTrainer

    def post_trainer_create(self, cfg: Mapping[str, Any], trainer: Any) -> None:
        if self._constrains(cfg) and not isinstance(trainer, ProConMixin):
            raise ProConError(
                f"axolotl made a {type(trainer).__name__}, which has no constraint: put {__name__}.ProConPlugin first "
                "in plugins, and none that brings a trainer of its own"
            )

    def _constrains(self, cfg: Mapping[str, Any]) -> bool:
        return _is_asked_for(cfg) and AlphaSchedule.parse(_arguments(cfg).procon_settings().schedule).active


def _is_asked_for(cfg: Mapping[str, Any]) -> bool:
    """axolotl keeps the plugins of an earlier training in the same process."""
    return f"{__name__}.ProConPlugin" in (cfg.get("plugins") or [])


def _settings(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that are given, as training arguments.

    Raises:
        ProConError: if strength is given twice.
    """
    names = [item.name for item in fields(ProConAxolotlArguments)]
    settings: dict[str, Any] = {name: cfg[name] for name in names if cfg.get(name) is not None}
    settings |= {name: _text(settings[name]) for name in _TEXTS if name in settings}
    if cfg.get("procon_alpha") is not None:
        if "procon_schedule" in settings:
            raise ProConError("procon_alpha and procon_schedule both say how strong the constraint is: give one")
        check_alpha(cfg["procon_alpha"], "procon_alpha")
        settings["procon_schedule"] = f"procon_s:{cfg['procon_alpha']}"
    return settings


def _arguments(cfg: Mapping[str, Any]) -> ProConAxolotlArguments:
    return ProConAxolotlArguments(**_settings(cfg))


def _text(value: str | float | list[int | float | str]) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
