"""All defences by name, so that a command line or a study can run any of them on the same work."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel, Trainer

from procon.defences.constrained_sft import ConstrainedSFTTrainer
from procon.defences.frozen_layers import FrozenLayersTrainer
from procon.defences.hidden_states import HiddenStatesTrainer
from procon.defences.kl_to_start import KLToStartTrainer
from procon.defences.lisa import LisaTrainer
from procon.defences.moving_average import MovingAverageTrainer
from procon.defences.null_space import NullSpaceTrainer
from procon.defences.projected_gradients import ProjectedGradientsTrainer
from procon.defences.safe_lora import SafeLoRATrainer
from procon.defences.safe_merge import SafeMergeTrainer
from procon.defences.safety_step import SafetyStepTrainer
from procon.defences.steering import SteeringTrainer
from procon.defences.trainer import PlainTrainer
from procon.directions import Directions
from procon.errors import ProConError
from procon.settings import ChatSettings, check_setting
from procon.training import ProConArguments, ProConConfig, ProConTrainer

_PROCON = "ProCon, arXiv 2509.06795"


@dataclass(frozen=True)
class Defence:
    """A way of fine-tuning that is meant to keep refusals.

    Attributes:
        name: by which it is chosen.
        label: for tables.
        summary: one line.
        source: paper and arXiv id.
        trainer: the class that trains.
        config: training arguments that it sets if they are left at their defaults.
        safety: whether safety samples are mixed into its training data (:func:`procon.data.mix_safety`).
        needs: what else its trainer takes: of ``"directions"``, ``"alignment_dataset"``, ``"base"``.
    """

    name: str
    label: str
    summary: str
    source: str
    trainer: type[Trainer] = PlainTrainer
    config: Mapping[str, Any] = field(default_factory=lambda: {"procon_schedule": "0"})
    safety: bool = False
    needs: frozenset[str] = frozenset()

    @property
    def settings(self) -> dict[str, Any]:
        """The trainer's own settings and their defaults."""
        if self.is_procon:
            return {}  # they are training arguments
        own = inspect.signature(self.trainer.__init__).parameters.values()
        return {p.name: p.default for p in own if p.kind is p.KEYWORD_ONLY and p.default is not p.empty}

    def check(self, settings: Mapping[str, Any]) -> None:
        """Raise ProConError for a setting that the defence does not have, or a value of another kind."""
        known = self.settings
        for key, value in settings.items():
            if key not in known:
                close = get_close_matches(key, known, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(known) or 'none'}"
                raise ProConError(f"defence {self.name!r} has no setting {key!r}: {hint}")
            default = known[key]
            # The texts select blocks, by a share of the depth too or by a list, or tokens.
            kinds = {str: (str, float, list, tuple), tuple: (list, tuple)}.get(type(default), (int, float))
            if not isinstance(value, kinds) or isinstance(value, bool):
                raise ProConError(
                    f"setting {key} of defence {self.name!r} is {value!r}: give one like its default, {default!r}"
                )
            if isinstance(default, str):
                check_setting(key, value, f"setting {key}")

    @property
    def is_procon(self) -> bool:
        """Whether it is the projection constraint."""
        return issubclass(self.trainer, ProConTrainer)

    def configure(self, args: ProConConfig) -> ProConConfig:
        """A copy of ``args`` with :attr:`config` in the fields that have the class's own default.

        Raises:
            ProConError: if ``procon_schedule`` contradicts the defence.
        """
        if not isinstance(args, ProConArguments):
            raise ProConError(
                f"args is a {type(args).__name__}: pass one that has ProConArguments, such as ProConConfig"
            )
        args, defaults = copy.copy(args), {f.name: f.default for f in fields(args)}
        for name, value in self.config.items():
            if getattr(args, name) == defaults[name]:
                setattr(args, name, value)
        if args.schedule().active != self.is_procon:
            self.refuse_schedule(args.procon_schedule)
        return args

    def refuse_schedule(self, schedule: str) -> NoReturn:
        """Raise ProConError for a ``procon_schedule`` that contradicts the defence."""
        what = "is the projection constraint" if self.is_procon else "has no projection constraint"
        raise ProConError(f"defence {self.name!r} {what}, but procon_schedule is {schedule!r}: leave it out")


def _procon(name: str, label: str, summary: str, schedule: str, *, safety: bool = False) -> Defence:
    return Defence(
        name,
        label,
        summary,
        _PROCON,
        ProConTrainer,
        {"procon_schedule": schedule},
        safety,
        frozenset({"directions"}),
    )


#: All defences, by name.
DEFENCES: dict[str, Defence] = {
    defence.name: defence
    for defence in (
        Defence("plain", "IFT", "Instruction fine-tuning, with no defence.", "the Trainer itself"),
        Defence(
            "safe",
            "IFT_safe",
            "Safety samples mixed into the training data.",
            "Bianchi et al. 2024, Safety-Tuned LLaMAs, arXiv 2309.07875",
            safety=True,
        ),
        Defence(
            "sppft",
            "SPPFT",
            "The blocks that carry safety do not train.",
            "Li et al. 2024, Safety Layers in Aligned LLMs, arXiv 2408.17003",
            FrozenLayersTrainer,
        ),
        Defence(
            "constrained_sft",
            "Constrained SFT",
            "A loss that keeps the first response tokens near the start.",
            "Qi et al. 2024, Safety Alignment Should Be Made More Than Just a Few Tokens Deep, arXiv 2406.05946",
            ConstrainedSFTTrainer,
        ),
        Defence(
            "safe_lora",
            "SafeLoRA",
            "After training, LoRA updates are projected on the step from base to aligned model.",
            "Hsu et al. 2024, Safe LoRA, arXiv 2405.16833",
            SafeLoRATrainer,
            needs=frozenset({"base"}),
        ),
        Defence(
            "lisa",
            "Lisa",
            "Steps on alignment data in between, and a proximal term.",
            "Huang et al. 2024, Lisa, arXiv 2405.18641",
            LisaTrainer,
            needs=frozenset({"alignment_dataset"}),
        ),
        Defence(
            "steering",
            "Preventative steering",
            "Hidden states are steered towards compliance while training.",
            "Chen et al. 2025, Persona Vectors, arXiv 2507.21509",
            SteeringTrainer,
            needs=frozenset({"directions"}),
        ),
        Defence(
            "kl",
            "KL to the start",
            "The distribution over each response token stays near the start's.",
            "Kaczer et al. 2026, In-Training Defenses against Emergent Misalignment, arXiv 2508.06249",
            KLToStartTrainer,
        ),
        Defence(
            "safegrad",
            "SafeGrad",
            "What in the user's gradient goes against alignment is taken out.",
            "Yi et al. 2025, Gradient Surgery for Safe LLM Fine-Tuning, arXiv 2508.07172",
            ProjectedGradientsTrainer,
            needs=frozenset({"alignment_dataset"}),
        ),
        Defence(
            "safety_step",
            "safety step",
            "After each step, the shortest one back to a bound on the loss on alignment data.",
            "the safety projection of SPARD, arXiv 2605.28030",
            SafetyStepTrainer,
            needs=frozenset({"alignment_dataset"}),
        ),
        Defence(
            "null_space",
            "null-space LoRA",
            "The update does not see the leading directions of malicious prompts.",
            "the projector of GuardSpace, arXiv 2510.14301",
            NullSpaceTrainer,
            needs=frozenset({"alignment_dataset"}),
        ),
        Defence(
            "moving_average",
            "moving average",
            "A moving average of the weights, in the place of the last ones.",
            "Kim et al. 2025, Rethinking Safety in LLM Fine-tuning, arXiv 2508.12531",
            MovingAverageTrainer,
        ),
        Defence(
            "safe_merge",
            "SafeMERGE",
            "After training, layers that lead away from alignment are merged with those of a safe adapter.",
            "Djuhera et al. 2025, SafeMERGE, arXiv 2503.17239",
            SafeMergeTrainer,
            needs=frozenset({"alignment_dataset", "base"}),
        ),
        Defence(
            "hidden_states",
            "Hidden states",
            "Whole hidden states are kept near the start.",
            "upper ablation of ProCon, arXiv 2509.06795",
            HiddenStatesTrainer,
        ),
        Defence(
            "sbr",
            "SBR",
            "The last hidden state of a few malicious prompts is kept near the start.",
            "Safety Anchor, arXiv 2605.05995",
            ProConTrainer,
            {
                "procon_schedule": "procon_s:1",
                "procon_anchors": "probes",
                "procon_probe_hold": "state",
                "procon_probe_weight": 10.0,
                "procon_probe_count": 8,
                "procon_probe_every": 1,
            },
            needs=frozenset({"directions"}),
        ),
        Defence(
            "block_em",
            "one-sided",
            "Only a fall of response tokens towards the benign side is penalised, squared.",
            "after BLOCK-EM, arXiv 2602.00767, with refusal directions in the place of SAE latents",
            ProConTrainer,
            {
                "procon_schedule": "procon_s",
                "procon_anchors": "recorded",
                "procon_sides": "fall",
                "procon_penalty": "squared",
                "procon_scope": "response",
            },
            needs=frozenset({"directions"}),
        ),
        _procon("procon_s", "ProCon_s", "The projection constraint throughout.", "procon_s"),
        _procon("procon_wu", "ProCon_wu", "The projection constraint in extra warm-up epochs.", "procon_wu"),
        _procon("procon_s_safe", "ProCon_s_safe", "ProCon_s with safety samples.", "procon_s", safety=True),
        # The paper halves the warm-up if safety samples are mixed in (section V-D).
        _procon("procon_wu_safe", "ProCon_wu_safe", "ProCon_wu with safety samples.", "procon_wu:1@2ep", safety=True),
    )
}


def find_defence(name: str) -> Defence:
    """The defence of that name; ProConError, with the nearest name, if there is none."""
    if name not in DEFENCES:
        close = get_close_matches(name, DEFENCES, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"choose one of {', '.join(DEFENCES)}"
        raise ProConError(f"there is no defence {name!r}: {hint}")
    return DEFENCES[name]


def build_trainer(
    name: str,
    model: nn.Module,
    args: ProConConfig,
    *,
    settings: Mapping[str, Any] | None = None,
    directions: Directions | None = None,
    alignment_dataset: Dataset | None = None,
    base: PreTrainedModel | str | Path | None = None,
    chat: ChatSettings | None = None,
    **trainer_arguments: Any,
) -> Trainer:
    """The trainer of defence ``name``, which takes of the rest what it needs and leaves what it does not.

    If ``DEFENCES[name].safety``, ``train_dataset`` is expected to have safety samples mixed in.

    Args:
        args: its ``procon_`` settings are used by the ProCon defences; those left at their defaults take the defence's.
        settings: the defence's own, in place of their defaults.
        directions: refusal directions of the model as training starts.
        alignment_dataset: tokenised, malicious prompts with refusals.
        base: the model before alignment, or its folder or hub name.
        chat: how the model is asked as directions and probes are found.
        trainer_arguments: ``train_dataset``, ``data_collator`` and others, as for the Trainer.

    Raises:
        ProConError: for an unknown defence or setting, and if something that it needs is not given.
    """
    defence = find_defence(name)
    args = defence.configure(args)
    settings = dict(settings or {})
    defence.check(settings)
    given = {"directions": directions, "alignment_dataset": alignment_dataset, "base": base}
    for need in sorted(defence.needs):
        if given[need] is None:
            raise ProConError(f"defence {name!r} needs {need}: pass {need}")
        settings[need] = given[need]
    if defence.is_procon:
        settings["chat"] = chat
    trainer: Any = defence.trainer(model, args, **settings, **trainer_arguments)
    trainer.chat = chat or ChatSettings()
    if not defence.is_procon:
        own = {key: value for key, value in settings.items() if key not in defence.needs}
        trainer.details = {"defence": name, "defence_settings": json.loads(json.dumps(own, default=str))}
    return trainer
