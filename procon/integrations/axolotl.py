"""axolotl's plugin: the constraint by keys of the YAML file::

    plugins:
      - procon.integrations.axolotl.ProConPlugin
    procon_schedule: procon_s:0.1

The keys are the settings of :class:`procon.training.ProConArguments`. Supervised fine-tuning, padded, packed or
flattened, is constrained; other trainings are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_type_hints

from procon.errors import ProConError
from procon.schedule import AlphaSchedule

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

#: Keys by which axolotl trains with another loss or trainer, or on split sequences.
_REFUSED = ("rl", "orpo_alpha", "reward_model", "process_reward_model", "trainer_cls", "use_pose")


@dataclass
class ProConAxolotlArguments(ProConArguments):
    """What the plugin adds to axolotl's training arguments."""

    procon_directions: str | None = field(
        default=None, metadata={"help": "File of refusal directions, for the term tokens; extracted if not given."}
    )


#: The keys that the plugin adds to axolotl's YAML file: the settings, as a YAML file has them.
_KINDS: dict[str, Any] = get_type_hints(ProConAxolotlArguments) | dict.fromkeys(
    _TEXTS, str | float | list[int | float | str]
)
_FIELDS: dict[str, Any] = {name: (kind | None, None) for name, kind in _KINDS.items()}
AxolotlKeys: Any = create_model("AxolotlKeys", **_FIELDS)


class ProConPlugin(BasePlugin):
    """Has axolotl train by :class:`procon.integrations.axolotl_trainer.ProConAxolotlTrainer`.

    If ``procon_schedule`` is 0 throughout, it changes nothing. Gradient checkpointing that the file asks for is made
    the non-reentrant kind: under axolotl's own choice training tokens would lose their gradient. What would lose the
    constraint ends in a ProConError.
    """

    def register(self, cfg: dict[str, Any]) -> None:
        """Check the YAML file as it was written."""
        for name in cfg if _is_asked_for(cfg) else ():
            if name.startswith("procon_") and name not in AxolotlKeys.model_fields:
                raise ProConError(f"there is no key {name}: the keys are {', '.join(AxolotlKeys.model_fields)}")
        if not _constrains(cfg):
            return
        settings = ProConAxolotlArguments(**_given(cfg)).procon_settings()
        check_probe_file(settings)
        checkpointing = cfg.get("gradient_checkpointing_kwargs") or {}
        lost = [name for name in _REFUSED if cfg.get(name)]
        if cfg.get("pretraining_dataset") and settings.has_tokens and settings.anchors == "recorded":
            lost.append("pretraining_dataset (with procon_anchors: recorded)")
        if (cfg.get("context_parallel_size") or 1) > 1:
            lost.append("context_parallel_size")
        if cfg.get("gradient_checkpointing") and checkpointing.get("use_reentrant") and settings.has_tokens:
            lost.append("use_reentrant: true")
        if lost:
            raise ProConError(f"{', '.join(lost)}: under this the constraint could not act: remove it")
        if cfg.get("gradient_checkpointing"):
            cfg["gradient_checkpointing_kwargs"] = {"use_reentrant": False, **checkpointing}

    def get_input_args(self) -> str:
        return f"{__name__}.{AxolotlKeys.__name__}"

    def get_training_args_mixin(self) -> str:
        return f"{__name__}.{ProConAxolotlArguments.__name__}"

    def get_training_args(self, cfg: Mapping[str, Any]) -> dict[str, Any] | None:
        return _given(cfg) if _is_asked_for(cfg) else None

    def pre_model_load(self, cfg: Mapping[str, Any]) -> None:
        """Check the settings that axolotl derived from the YAML file."""
        if _constrains(cfg) and cfg.get("sample_packing") and not cfg.get("attn_decontaminates_packing"):
            attention = cfg.get("attn_implementation")
            raise ProConError(f"under attn_implementation {attention!r} packed samples see each other: set it to sdpa")

    def get_trainer_cls(self, cfg: Mapping[str, Any]) -> type[ProConMixin] | None:
        if not _constrains(cfg):
            return None
        # Here, as axolotl has by now patched transformers for this training.
        from procon.integrations.axolotl_trainer import ProConAxolotlTrainer

        return ProConAxolotlTrainer

    def post_trainer_create(self, cfg: Mapping[str, Any], trainer: Any) -> None:
        if _constrains(cfg) and not isinstance(trainer, ProConMixin):
            raise ProConError(
                f"axolotl made a {type(trainer).__name__}, which has no constraint: let no other plugin bring a trainer"
            )


def _is_asked_for(cfg: Mapping[str, Any]) -> bool:
    """axolotl keeps the plugins of an earlier training in the same process."""
    return f"{__name__}.ProConPlugin" in (cfg.get("plugins") or [])


def _constrains(cfg: Mapping[str, Any]) -> bool:
    return (
        _is_asked_for(cfg)
        and AlphaSchedule.parse(ProConAxolotlArguments(**_given(cfg)).procon_settings().schedule).active
    )


def _given(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that are given, as training arguments."""
    found = {name: cfg[name] for name in AxolotlKeys.model_fields if cfg.get(name) is not None}
    for name in _TEXTS:
        if name in found:
            value = found[name]
            found[name] = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return found
