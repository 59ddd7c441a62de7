"""Training arguments with the method's settings: made from :class:`procon.settings.ProConSettings`, which has them."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, make_dataclass
from typing import TYPE_CHECKING, Any, get_type_hints

from transformers import TrainingArguments

from procon.chat import load_instructions
from procon.settings import AnchorSource, Penalty, ProConSettings, Terms, TokenScope, check_settings

#: What the names of the settings begin with among training arguments.
PREFIX = "procon_"

if TYPE_CHECKING:

    @dataclass
    class _Settings:  # what editors and type checkers show of what is made below
        procon_terms: Terms = "probes"
        procon_schedule: str = "procon_s"
        procon_scope: TokenScope = "all"
        procon_blocks: str = "all"
        procon_penalty: Penalty = "absolute"
        procon_anchors: AnchorSource = "recorded"
        procon_anchors_dir: str | None = None
        procon_probes: str = "builtin"
        procon_probe_batch: int = 4
        procon_probe_every: int = 2
        procon_probe_weight: float = 15.0
        procon_probe_reply_tokens: int = 48

else:
    _types = get_type_hints(ProConSettings)
    _Settings = make_dataclass(
        "_Settings",
        [
            (
                PREFIX + setting.name,
                # A text, as command lines give it.
                str if setting.name == "blocks" else _types[setting.name],
                field(default=setting.default, metadata=setting.metadata),
            )
            for setting in fields(ProConSettings)
        ],
    )


@dataclass
class ProConArguments(_Settings):
    """The settings of the method, to mix into any TrainingArguments::

        @dataclass
        class MyConfig(ProConArguments, MyTrainingArguments): ...

    Those of :class:`procon.settings.ProConSettings`, with names that begin with ``procon_``. ``procon_blocks`` is a
    text, as command lines give it. The trainer reads them once, as it is made.

    Raises:
        ProConError: for a value that a setting cannot have.
    """

    def __post_init__(self) -> None:
        # Of the arguments that it is mixed into, if they have one.
        others = getattr(super(), "__post_init__", None)
        if others is not None:
            others()
        self.procon_settings()

    def procon_settings(self) -> ProConSettings:
        """The settings without their prefix, checked; a wrong one is named as it stands here."""
        names = [setting.name for setting in fields(ProConSettings)]
        values: dict[str, Any] = {name: getattr(self, PREFIX + name) for name in names}
        check_settings(values, PREFIX)
        return ProConSettings(**values)


def check_probe_file(settings: ProConSettings) -> None:
    """Raise ProConError if the probes are in a file that cannot be read."""
    if settings.probe_file is not None:
        load_instructions(settings.probe_file)


@dataclass
class ProConConfig(ProConArguments, TrainingArguments):
    """transformers' TrainingArguments with the settings of the method."""
