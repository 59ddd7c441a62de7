"""The model that every run starts from, and the monitors that watch it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.monitors.logistic import fit
from benchmarks.monitors.prompts import CONCEPTS, labelled_prompts
from benchmarks.study.plan import Size
from procon.chat import ContrastPrompts, Split, builtin_prompts
from procon.directions import Directions, auroc, each_last_token
from procon.errors import ProConError
from procon.evaluation import measure_monitors
from procon.models import find_decoder, load_model

#: In the working folder.
MONITORS, REFUSAL = "monitors.safetensors", "refusal.safetensors"

#: Monitors are trained on the first split, and where they read is chosen on the second.
_TRAINING: tuple[Split, Split] = ("extraction", "validation")


@dataclass(frozen=True)
class Watched:
    """A chat model, and linear probes that were trained on its hidden states.

    Attributes:
        folder: where the model is.
        monitors: one direction for each of :data:`CONCEPTS`, at the one site where it reads.
        refusal: refusal directions of the model.
        pairs: twins of each concept that monitors are read on, at most.
    """

    folder: Path
    tokenizer: PreTrainedTokenizerBase
    monitors: Directions
    refusal: Directions
    pairs: int

    @classmethod
    def open(cls, folder: Path, work: Path, size: Size) -> Watched:
        """Train the monitors of the model in ``folder``, or take those that are in ``work``."""
        pairs = size.pairs
        model, tokenizer = load_model(folder)
        if (work / MONITORS).is_file() and (work / REFUSAL).is_file():
            monitors = Directions.load(work / MONITORS)
            monitors.check_origin(model)
            return cls(folder, tokenizer, monitors, Directions.load(work / REFUSAL), pairs)
        monitors = Directions.combine(*(_train(model, tokenizer, concept, pairs) for concept in CONCEPTS))
        prompts = builtin_prompts("extraction").first(size.extraction)
        refusal = Directions.extract(model, tokenizer, prompts, progress=False)
        monitors.save(work / MONITORS)
        refusal.save(work / REFUSAL)
        return cls(folder, tokenizer, monitors, refusal, pairs)

    def model(self) -> PreTrainedModel:
        """A fresh copy of the model."""
        return load_model(self.folder)[0]

    def sites(self) -> dict[str, int]:
        """Where each monitor reads: a block, or the number of blocks for the output of the last one."""
        there = self.monitors.vectors.any(-1)
        return {name: int(there[:, column].nonzero().item()) for column, name in enumerate(self.monitors.names)}

    def directions(self, kind: str) -> Directions:
        """What a method anchors: ``refusal``, ``monitors``, or ``refusal+monitors``.

        Raises:
            ProConError: for another kind.
        """
        kinds = {"refusal": (self.refusal,), "monitors": (self.monitors,)}
        parts = kind.split("+")
        if not set(parts) <= kinds.keys():
            raise ProConError(f"directions is {kind!r}: give refusal, monitors, or refusal+monitors")
        return Directions.combine(*(one for part in parts for one in kinds[part]))

    def probe_prompts(self, twins: int) -> list[str]:
        """``twins`` of each concept, of those that the monitors were trained on."""
        sides = [labelled_prompts(concept, "extraction", twins) for concept in CONCEPTS]
        return [prompt for side in sides for pair in zip(side.malicious, side.benign, strict=True) for prompt in pair]

    def read(self, model: PreTrainedModel, split: Split) -> dict[str, dict]:
        """What the monitors read of a model that came from this one: site, and the score of each prompt."""
        prompts = {concept: labelled_prompts(concept, split, self.pairs) for concept in CONCEPTS}
        readings = measure_monitors(model, self.tokenizer, self.monitors, prompts, progress=False)
        sites = self.sites()
        return {
            name: {
                "site": sites[name],
                **{
                    side: [round(score, 5) for score in scores[:, sites[name]].tolist()]
                    for side, scores in zip(("positive", "negative"), reading.scores, strict=True)
                },
            }
            for name, reading in readings.items()
        }


def _train(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, concept: str, pairs: int) -> Directions:
    """A monitor at the site where it separates validation prompts best; of several, at the deepest.

    It says yes if yes is more likely than no, at a score of 0.
    """
    train, validation = (labelled_prompts(concept, split, pairs) for split in _TRAINING)
    states, others = (_states(model, tokenizer, prompts) for prompts in (train, validation))
    probes = [fit(states[0][:, site], states[1][:, site]) for site in range(states[0].shape[1])]
    quality = [
        auroc(*(side[:, site].double() @ vector for side in others)).item() for site, (vector, _) in enumerate(probes)
    ]
    site = max(range(len(probes)), key=lambda site: (quality[site], site))
    vector, bias = probes[site]
    return Directions.from_vectors(
        model,
        {site: vector},
        name=concept,
        bias=bias,
        threshold=0.0,
        tokenizer=tokenizer,
        positive=train.malicious,
        negative=train.benign,
        progress=False,
    )


def _states(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: ContrastPrompts
) -> tuple[Tensor, Tensor]:
    """Block inputs, and the output of the last block, at each prompt's last token: ``[n, L + 1, D]`` of each side."""
    decoder = find_decoder(model)
    found = []
    for side in (prompts.malicious, prompts.benign):
        states = torch.empty(len(side), len(decoder.blocks) + 1, decoder.hidden_size)

        def consume(rows: list[int], site: int, hidden: Tensor, states: Tensor = states) -> None:
            states[rows, site] = hidden.float().cpu()

        each_last_token(model, tokenizer, side, consume, 32, "hidden states", False)
        found.append(states)
    return found[0], found[1]
