"""What the method is: its settings, their defaults and their checks; and the recipe that the paper trains by.

Every door to the constraint takes its defaults from here, and refuses a wrong value by the checks here: constraint,
anchors, trainers, callback, axolotl's keys and the command line. Nothing heavy is imported: ``--help`` comes at once.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from typing import Any, Literal, get_args

from procon.errors import ProConError
from procon.schedule import AlphaSchedule

TokenScope = Literal["response", "prompt", "all"]

#: Which blocks: all, the deepest share of them, or indices, from the end if they are negative.
Blocks = Literal["all"] | float | Sequence[int]

Penalty = Literal["squared", "absolute"]
Fuse = Literal["auto", "never"]
Backend = Literal["auto", "triton", "eager"]
Terms = Literal["probes", "tokens", "both"]
AnchorSource = Literal["recorded", "live"]

#: The environment variable that says which backend ``"auto"`` means.
BACKEND_VARIABLE = "PROCON_BACKEND"

#: Directions per block that one call of the op takes.
MAX_DIRECTIONS = 8

#: The values of each setting, and each argument of the op, that is one of a few words.
CHOICES: dict[str, tuple[str, ...]] = {
    "scope": get_args(TokenScope),
    "penalty": get_args(Penalty),
    "terms": get_args(Terms),
    "fuse": get_args(Fuse),
    "backend": get_args(Backend),
    "anchors": get_args(AnchorSource),
}

#: What each setting that is a whole number is at least.
_LEAST = {"probe_batch": 1, "probe_every": 1, "probe_reply_tokens": 0, "thinking_tokens": 1}

#: The settings of one term alone.
_OF_TERM = {
    "tokens": ("scope", "blocks", "penalty", "anchors", "anchors_dir"),
    "probes": ("probes", "probe_batch", "probe_every", "probe_weight", "probe_reply_tokens"),
}


def _setting(default: Any, text: str) -> Any:
    """A field with the sentence that ``--help`` and the documentation show."""
    given: dict[str, Any] = {"default_factory": dict} if default is dict else {"default": default}
    return field(**given, metadata={"help": text})


@dataclass(frozen=True)
class ProConSettings:
    """The settings of the method; the defaults are what the project recommends. Checked once, here.

    Every door has these: trainers as ``procon_schedule`` and so on, axolotl's keys and the command line's flags too.

    Raises:
        ProConError: for a value that a setting cannot have, or a setting of a term that is not there.
    """

    terms: Terms = _setting(
        "probes",
        "What the loss adds: probes, fixed prompts at which the model is kept; tokens, projections of the training "
        "tokens (paper); or both.",
    )

    schedule: str = _setting(
        "procon_s",
        "Strength over training: procon_s[:ALPHA], procon_wu[:ALPHA@4ep] (extra warm-up epochs, then 0), or phases "
        "such as 1@2ep,0.1@200steps,0. 0 switches the constraint off.",
    )
    scope: TokenScope = _setting("all", "Training tokens that are constrained: response (paper), prompt or all.")
    blocks: Blocks = _setting(
        "all",
        "Blocks whose inputs are constrained: all that have a direction (paper), the deepest share such as 0.5, or "
        "indices such as 8,9,10.",
    )
    penalty: Penalty = _setting("absolute", "Penalty on a departure: squared, or absolute (as the paper typesets it).")
    anchors: AnchorSource = _setting(
        "recorded",
        "Anchors of the training tokens: recorded before training (paper), or live, from a forward of the starting "
        "model on each batch.",
    )
    anchors_dir: str | None = _setting(None, "Where recorded anchors are kept; OUTPUT_DIR/_anchors if not given.")
    probes: str = _setting(
        "builtin",
        "Prompts at which the model is kept: builtin, malicious ones and, if replies are kept, their benign twins; or "
        "a file of others, .txt or .jsonl.",
    )
    probe_batch: int = _setting(4, "How many of them are run at a time, in turn.")
    probe_every: int = _setting(2, "The probes are run in the last of every so many optimiser steps.")
    probe_weight: float = _setting(15.0, "Weight of the probes' penalty; alpha multiplies all terms.")
    probe_reply_tokens: int = _setting(
        48,
        "Along how many tokens of the starting model's own reply to each probe its predictions are kept; 0: none, but "
        "the last hidden state where the reply begins (SBR).",
    )

    def __post_init__(self) -> None:
        check_settings(vars(self))
        object.__setattr__(self, "probes", str(self.probes))
        blocks = parse_blocks(self.blocks) if isinstance(self.blocks, str) else self.blocks
        object.__setattr__(self, "blocks", tuple(blocks) if isinstance(blocks, list) else blocks)

    @property
    def has_tokens(self) -> bool:
        """Whether training tokens are kept."""
        return self.terms != "probes"

    @property
    def has_probes(self) -> bool:
        """Whether probes are kept."""
        return self.terms != "tokens"

    @property
    def probe_file(self) -> str | None:
        """The file of the probes; None for the built-in ones."""
        return None if self.probes == "builtin" else self.probes


#: What rendering itself sets, so that a user cannot.
_RENDERING = (
    {"conversation", "messages", "tools", "documents", "chat_template", "tokenize", "padding", "truncation"}
    | {"add_generation_prompt", "continue_final_message", "max_length", "tokenizer_kwargs"}
    | {"return_tensors", "return_dict", "return_assistant_tokens_mask"}
)


@dataclass(frozen=True)
class ChatSettings:
    """How a model is spoken to, and where its thoughts end; for extraction, evaluation, probes and training alike.

    Raises:
        ProConError: for a value that a setting cannot have.
    """

    system_prompt: str | None = _setting(
        None,
        "System prompt of every prompt that is asked; the template's own, if it has one, if not given. "
        "Training data keep their own.",
    )
    chat_template_kwargs: Mapping[str, Any] = _setting(
        dict,
        'Variables of the chat template, such as {"enable_thinking": true}. Thinking is switched off if the '
        "template has a switch for it and this does not say otherwise.",
    )
    thinking_markers: tuple[str, ...] = _setting(
        (),
        "What begins and what ends a thought, or what ends it alone if replies begin with one; those known of "
        "model families if not given.",
    )
    thinking_tokens: int = _setting(
        1024, "Tokens that a thought may have; the length of the reply itself counts from its end."
    )

    def __post_init__(self) -> None:
        if self.system_prompt is not None and not (isinstance(self.system_prompt, str) and self.system_prompt.strip()):
            raise ProConError(f"system_prompt is {self.system_prompt!r:.60}: give a text that says something")
        kwargs = self.chat_template_kwargs
        if not isinstance(kwargs, Mapping) or not all(isinstance(name, str) for name in kwargs):
            raise ProConError(f"chat_template_kwargs is {kwargs!r:.60}: give names and values")
        if taken := sorted(_RENDERING & kwargs.keys()):
            raise ProConError(f"chat_template_kwargs has {taken[0]!r}, which rendering sets itself: leave it out")
        markers = self.thinking_markers
        known = isinstance(markers, list | tuple) and len(markers) <= 2
        if not known or not all(isinstance(marker, str) and marker.strip() for marker in markers):
            raise ProConError(
                f"thinking_markers is {markers!r:.60}: give what begins and what ends a thought, or what ends it alone"
            )
        check_setting("thinking_tokens", self.thinking_tokens)


def check_settings(values: Mapping[str, Any], prefix: str = "") -> None:
    """Raise ProConError for the first of the method's settings that has a value that it cannot have.

    Args:
        prefix: what the user's names of the settings begin with, such as ``procon_``.
    """
    for setting in fields(ProConSettings):
        check_setting(setting.name, values[setting.name], prefix + setting.name)
    backend_variable()
    terms = values["terms"]
    if terms == "both" or not AlphaSchedule.parse(values["schedule"]).active:
        return
    ((other, names),) = ((term, names) for term, names in _OF_TERM.items() if term != terms)
    for name in names:
        if values[name] != getattr(ProConSettings, name):
            raise ProConError(
                f"{prefix}{name} is of the {other}, which {prefix}terms {terms!r} leaves out: take {prefix}terms "
                f"{other!r} or 'both', or leave {prefix}{name} as it is by default"
            )


def check_setting(setting: str, value: Any, name: str | None = None) -> None:
    """Raise ProConError if ``value`` is none that the setting can have.

    Args:
        setting: a field of :class:`ProConSettings`, a key of :data:`CHOICES`, or ``thinking_tokens``.
        name: what the user calls it, such as ``procon_penalty``; its own name if not given.
    """
    name = name or setting
    if setting == "schedule":
        if not isinstance(value, str):
            raise ProConError(f"{name} is {value!r}: give a text such as 'procon_s:0.2'")
        try:
            AlphaSchedule.parse(value)
        except ProConError as error:
            raise ProConError(f"setting {name}: {error}") from None
    elif setting == "blocks":
        parse_blocks(value, name) if isinstance(value, str) else check_blocks(value, name)
    elif setting in _LEAST:
        if not isinstance(value, Integral) or isinstance(value, bool) or value < _LEAST[setting]:
            raise ProConError(f"{name} is {value!r}: give a whole number, {_LEAST[setting]} or more")
    elif setting == "probe_weight":
        if not 0 < _as_float(value) < math.inf:
            raise ProConError(f"{name} is {value!r}: give a finite number above 0")
    elif setting == "probes":
        if not isinstance(value, str | os.PathLike) or not str(value).strip():
            raise ProConError(f"{name} is {value!r}: give 'builtin', or the path of a file of prompts")
    elif setting == "anchors_dir":
        if value is not None and not isinstance(value, str | os.PathLike):
            raise ProConError(f"{name} is {value!r}: give the path of a folder")
    else:
        check_choice(name, value, CHOICES[setting])


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise ProConError, naming the choices, if ``value`` is not one of them."""
    if value not in choices:
        raise ProConError(f"{name} is {value!r}: choose one of {', '.join(choices)}")


#: How names of data files end; another name may be that of a data set on the hub.
DATA_SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")

#: ``owner/name``, or one of the few names without an owner; of 96 letters at most.
_HUB_NAME = re.compile(r"(?!.{97})[\w-][\w.-]*(/[\w-][\w.-]*)?")


def check_name(name: str | os.PathLike[str], what: str = "model", remedy: str = "give a folder or a hub name") -> None:
    """Raise ProConError if ``name`` is neither there nor could be a name on the hub."""
    if not (str(name) and os.path.exists(name)) and not _HUB_NAME.fullmatch(str(name)):
        raise ProConError(f"{what} {str(name)!r} cannot be loaded (there is no such file or folder): {remedy}")


def backend_variable() -> str:
    """The backend that the environment asks for, ``"auto"`` if it asks for none; ProConError if there is no such."""
    backend = os.environ.get(BACKEND_VARIABLE, "auto")
    check_choice(f"the environment variable {BACKEND_VARIABLE}", backend, CHOICES["backend"])
    return backend


def check_blocks(value: object, name: str = "blocks") -> None:
    """Raise ProConError unless ``value`` is a :data:`Blocks`; whether a model has them shows later."""
    parts = [*value] if isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray) else [None]
    if isinstance(value, float):
        if not 0 < value <= 1:
            raise ProConError(f"{name} is the fraction {value:g}: give one above 0 and at most 1")
    elif not parts:
        raise ProConError(f"{name} is empty: give at least one block")
    elif not (isinstance(value, str) and value == "all") and not all(
        isinstance(part, Integral) and not isinstance(part, bool) for part in parts
    ):
        raise ProConError(f"{name} is {value!r}: give 'all', a fraction such as 0.5, or indices such as 8,9,10")


def parse_blocks(text: str, name: str = "blocks") -> Blocks:
    """Blocks from a text: ``all``, a share such as ``0.5``, or indices ``8,9,10``.

    Raises:
        ProConError: for anything else.
    """
    blocks: Any = text.strip()
    with suppress(ValueError):  # no numbers: 'all', or a text that is refused
        blocks = float(blocks) if "." in blocks else [int(part) for part in blocks.split(",")]
    check_blocks(blocks, name)
    return blocks


def _as_float(value: object) -> float:
    """A number as a float; NaN for what is none, and for one that no float can hold."""
    try:
        return float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    except OverflowError:
        return math.nan


#: The defaults of every door.
DEFAULTS = ProConSettings()


@dataclass(frozen=True)
class TrainingRecipe:
    """How the paper fine-tunes (section IV-A2): rank, scale and modules of the LoRA adapter, highest learning rate."""

    lora_r: int = 8
    lora_alpha: int = 16
    lora_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    learning_rate: float = 2e-4

    def lora(self) -> dict[str, Any]:
        """Arguments of PEFT's ``LoraConfig``."""
        return {
            "r": self.lora_r,
            "lora_alpha": self.lora_alpha,
            "target_modules": list(self.lora_targets),
            "task_type": "CAUSAL_LM",
        }


PAPER_RECIPE = TrainingRecipe()
