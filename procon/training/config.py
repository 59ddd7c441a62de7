"""Training arguments with the constraint's settings."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from transformers import TrainingArguments

from procon.chat import load_instructions
from procon.errors import ProConError
from procon.schedule import AlphaSchedule
from procon.settings import (
    DEFAULTS,
    AnchorSettings,
    AnchorSource,
    Backend,
    Blocks,
    ConstraintSettings,
    Fuse,
    Penalty,
    ProbeHold,
    Reduction,
    Sides,
    TokenScope,
    Units,
    check_measured,
    check_setting,
    parse_blocks,
    sentences,
)

#: What the names of the constraint's settings begin with among training arguments.
PREFIX = "procon_"

_SENTENCES = sentences(ConstraintSettings) | sentences(AnchorSettings)


def _help(setting: str) -> dict[str, str]:
    """What ``--help`` shows: the sentence beneath the constraint's own setting."""
    return {"help": _SENTENCES.get(setting, "")}


@dataclass
class ProConArguments:
    """The settings of the constraint, to mix into any TrainingArguments::

        @dataclass
        class MyConfig(ProConArguments, MyTrainingArguments): ...

    They are those of :class:`procon.settings.ConstraintSettings` and :class:`procon.settings.AnchorSettings`, with
    their defaults, and names that begin with ``procon_``. ``procon_blocks`` is a text, as command lines give it.

    Raises:
        ProConError: for a value that a setting cannot have.
    """

    procon_schedule: str = field(default=DEFAULTS.schedule, metadata=_help("schedule"))
    procon_scope: TokenScope = field(default=DEFAULTS.scope, metadata=_help("scope"))
    procon_blocks: str = field(default=str(DEFAULTS.blocks), metadata=_help("blocks"))
    procon_penalty: Penalty = field(default=DEFAULTS.penalty, metadata=_help("penalty"))
    procon_sides: Sides = field(default=DEFAULTS.sides, metadata=_help("sides"))
    procon_units: Units = field(default=DEFAULTS.units, metadata=_help("units"))
    procon_reduction: Reduction = field(default=DEFAULTS.reduction, metadata=_help("reduction"))
    procon_fuse: Fuse = field(default=DEFAULTS.fuse, metadata=_help("fuse"))
    procon_backend: Backend = field(default=DEFAULTS.backend, metadata=_help("backend"))
    procon_anchors: AnchorSource = field(default=AnchorSettings.anchors, metadata=_help("anchors"))
    procon_probes: str | None = field(default=AnchorSettings.probes, metadata=_help("probes"))
    procon_probe_count: int = field(default=AnchorSettings.probe_count, metadata=_help("probe_count"))
    procon_probe_batch: int = field(default=AnchorSettings.probe_batch, metadata=_help("probe_batch"))
    procon_probe_every: int = field(default=AnchorSettings.probe_every, metadata=_help("probe_every"))
    procon_probe_weight: float = field(default=AnchorSettings.probe_weight, metadata=_help("probe_weight"))
    procon_probe_hold: ProbeHold = field(default=AnchorSettings.probe_hold, metadata=_help("probe_hold"))
    procon_probe_reply_tokens: int = field(
        default=AnchorSettings.probe_reply_tokens, metadata=_help("probe_reply_tokens")
    )
    procon_anchors_dir: str | None = field(
        default=None, metadata={"help": "Where initial projections are kept; OUTPUT_DIR/_anchors if not given."}
    )
    procon_overwrite: bool = field(
        default=False,
        metadata={"help": "Delete the model and the checkpoints that another training left in the output folder."},
    )

    def __post_init__(self) -> None:
        # Of the arguments that it is mixed into, if they have one.
        others = getattr(super(), "__post_init__", None)
        if others is not None:
            others()
        self.constraint_settings()
        self.anchor_settings()
        self.schedule()

    def constraint_settings(self) -> ConstraintSettings:
        """The settings without their prefix, checked; a wrong one is named as it stands here."""
        values: dict[str, Any] = {item.name: getattr(self, PREFIX + item.name) for item in fields(ConstraintSettings)}
        values["blocks"] = self.blocks()
        for setting, value in values.items():
            check_setting(setting, value, PREFIX + setting)
        check_measured(self.procon_schedule, self.procon_penalty, PREFIX)
        return ConstraintSettings(**values)

    def anchor_settings(self) -> AnchorSettings:
        """Where anchors come from, checked; a wrong setting is named as it stands here."""
        values: dict[str, Any] = {item.name: getattr(self, PREFIX + item.name) for item in fields(AnchorSettings)}
        for setting, value in values.items():
            check_setting(setting, value, PREFIX + setting)
        return AnchorSettings(**values)

    def check_probe_file(self) -> None:
        """Raise ProConError if ``procon_probes`` is needed and cannot be read."""
        settings = self.anchor_settings()
        if settings.has_probes and settings.probes is not None:
            load_instructions(settings.probes)

    def schedule(self) -> AlphaSchedule:
        """The parsed ``procon_schedule``; ProConError if nothing is there that it could go by."""
        schedule = AlphaSchedule.parse(self.procon_schedule)
        if schedule.hold is not None and self.anchor_settings().measured is None:
            raise ProConError(
                f"procon_schedule is {self.procon_schedule!r}, which goes by shifts along the directions, and probes "
                "kept at their whole state have none: set procon_probe_hold to 'projections', or take a schedule of "
                "phases"
            )
        return schedule

    def blocks(self) -> Blocks:
        """The parsed ``procon_blocks``."""
        return parse_blocks(self.procon_blocks, f"{PREFIX}blocks")


@dataclass
class ProConConfig(ProConArguments, TrainingArguments):
    """transformers' TrainingArguments with the settings of the constraint."""
