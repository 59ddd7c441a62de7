"""The model that every run starts from, and what is measured on it once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.study.displacement import last_token_states
from benchmarks.study.qwen import fetch_qwen
from benchmarks.study.refusal_odds import refusal_tokens
from procon.chat import ContrastPrompts, builtin_prompts
from procon.demo import fetch_demo_model, teach_refusal
from procon.directions import ContrastMeans, Directions
from procon.errors import ProConError
from procon.models import load_model, weights_hash


@dataclass(frozen=True)
class Start:
    """A chat model that refuses, its directions, and its state on the probe prompts.

    Attributes:
        folder: where the model is.
        directions: from the extraction prompts; constrained in training.
        reference: from the probe prompts; drift is measured against them.
        prompts: contrast prompts that the directions come from.
        states: block inputs at the last token of the probe prompts, malicious ones first: ``[2 n, L, D]``.
        tokens: by which the model opens refusals.
        weights: hash of the model's weights.
        loading: of the model, in whose dtype it is trained and measured; arguments of ``load_model``.
    """

    folder: str | Path
    tokenizer: PreTrainedTokenizerBase
    directions: Directions
    reference: Directions
    prompts: ContrastPrompts
    states: Tensor
    tokens: list[int]
    weights: str
    loading: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def open(
        cls,
        folder: str | Path,
        *,
        extraction: int,
        pairs: int,
        loading: Mapping[str, Any] | None = None,
    ) -> Start:
        """Load the model, a folder or hub name, and measure it.

        Args:
            extraction: contrast pairs that the directions come from.
            pairs: those of them that drift and displacement are measured on.
            loading: arguments of ``load_model``.

        Raises:
            ProConError: if the model refuses nothing.
        """
        loading = loading or {}
        model, tokenizer = load_model(folder, **loading)
        prompts = builtin_prompts("extraction").first(extraction)
        directions = Directions.extract(
            model, tokenizer, prompts, held_out=builtin_prompts("validation").first(pairs), progress=False
        )
        if directions.provenance["refusal_rate"] == 0:
            raise ProConError(f"model {str(folder)!r} refuses nothing: there is nothing to preserve; give a chat model")
        states = _probe_states(model, tokenizer, pairs)
        return cls(
            folder=folder,
            tokenizer=tokenizer,
            directions=directions,
            reference=Directions.from_means(contrast_means(states)),
            prompts=prompts,
            states=states,
            tokens=refusal_tokens(model, tokenizer, prompts.first(pairs)),
            weights=weights_hash(model),
            loading=loading,
        )

    def model(self) -> PreTrainedModel:
        """A fresh copy of the model."""
        return load_model(self.folder, **self.loading)[0]

    def extract(self, k: int) -> Directions:
        """``k`` directions per block."""
        return Directions.extract(self.model(), self.tokenizer, self.prompts, k=k, check_refusal=False, progress=False)

    def probe_states(self, model: PreTrainedModel) -> Tensor:
        """As :attr:`states`, of a model that came from this one."""
        return _probe_states(model, self.tokenizer, len(self.states) // 2)


def _probe_states(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: int) -> Tensor:
    probes = builtin_prompts("extraction").first(pairs)
    return last_token_states(model, tokenizer, (*probes.malicious, *probes.benign))


def contrast_means(states: Tensor) -> ContrastMeans:
    """The means that directions come from, of probe states ``[2 n, L, D]``, malicious ones first."""
    malicious, benign = states.double().chunk(2)
    norms = (side.norm(dim=-1).mean(0) for side in (malicious, benign))
    return ContrastMeans(malicious.mean(0), benign.mean(0), torch.maximum(*norms))


def demo_start(work: Path) -> Path:
    """SmolLM2-135M-Instruct with the package's refusal adapter merged, written once to a folder in ``work``."""
    folder = work / "start"
    if not (folder / "config.json").is_file():
        model, tokenizer = load_model(fetch_demo_model())
        teach_refusal(model).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def open_start(
    model: str,
    *,
    extraction: int,
    pairs: int,
    work: Path,
    loading: Mapping[str, Any] | None = None,
) -> Start:
    """As :meth:`Start.open`, by a name in the study too."""
    return Start.open(start_folder(model, work), extraction=extraction, pairs=pairs, loading=loading)


def start_folder(model: str, work: Path) -> str | Path:
    """Where a model is that may have a name in the study: ``smollm2``, which is written to ``work``, or ``qwen``."""
    if model == "smollm2":
        return demo_start(work)
    return fetch_qwen() if model == "qwen" else model
