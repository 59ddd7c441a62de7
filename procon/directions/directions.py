"""Directions of any concept: from two sets of prompts, or from given vectors; several concepts at once."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from procon.chat import ContrastPrompts
from procon.directions.block_directions import DIRECTIONS, BlockDirections
from procon.directions.concepts import check_name, contrast, hold_out
from procon.directions.contrast_means import DEAD_GAP, ContrastMeans
from procon.directions.file import CONCEPT_TENSORS, read, write
from procon.directions.given_vectors import GivenVectors, Numbers, Vectors
from procon.directions.projections import auroc, project_on_all
from procon.directions.provenance import provenance_of
from procon.directions.refusal_directions import RefusalDirections
from procon.directions.soundness import concepts_flaw
from procon.errors import ProConError
from procon.models import find_decoder, refuse_unprepared
from procon.settings import MAX_DIRECTIONS, ChatSettings


@dataclass(frozen=True)
class Directions(BlockDirections):
    """One direction per block for each of ``K`` named concepts, at most 8; a concept may have none at a block.

    They need not be at right angles to each other: each is what its name says. Rows are the inputs of the blocks and
    the output of the last one, ``L`` in all.

    Under the constraint each vector counts alike: the penalty is a mean over constrained tokens and constrained blocks
    of the sum over the concepts. A vector that is not there adds 0, so a concept with vectors at a tenth of the
    constrained blocks has a tenth of the weight that it would have alone at those blocks.

    Attributes:
        vectors: ``[L, K, D]`` fp32, unit vectors, or zeros where a concept has none.
        scale: ``[L, K]`` fp32, the unit of a departure under ``units="gap"``: the distance between the two means of
            prompts along it. NaN if no prompts were given, 0 where there is no vector.
        auroc: ``[L, K]`` fp32, how well the projection separates positive from negative prompts; NaN if not measured.
        positive, negative: ``[L, K]`` fp32, projections of the means of both sides; NaN if not measured.
        names: of the concepts, ``K`` different ones.
        length: ``[L, K]`` fp32, of each vector as it was given: a probe's score is ``length * <vector, x> + bias``.
        bias: ``[L, K]`` fp32, of a linear probe; 0 if it has none.
        threshold: ``[L, K]`` fp32, the score from which a probe says that the concept is there; NaN if it has none.
        provenance: under ``concepts``, for each name, where its vectors came from.
        last_output: whether the last row is that of the last block's output.
    """

    vectors: Tensor
    scale: Tensor
    auroc: Tensor
    positive: Tensor
    negative: Tensor
    names: tuple[str, ...]
    length: Tensor
    bias: Tensor
    threshold: Tensor
    provenance: dict[str, Any] = field(default_factory=dict)
    last_output: bool = False

    @property
    def basis(self) -> Tensor:
        return self.vectors

    @property
    def gaps(self) -> Tensor:
        return self.scale

    @property
    def concepts(self) -> tuple[str, ...]:
        return self.names

    @property
    def usable(self) -> Tensor:
        return self.vectors.flatten(1).any(-1)

    @property
    def hash(self) -> str:
        data = self.vectors.numpy().tobytes() + self.scale.numpy().tobytes()
        return hashlib.sha256(data).hexdigest()[:16]

    @property
    def at_block_inputs(self) -> Directions:
        if not self.last_output:
            return self
        return replace(self, **{name: getattr(self, name)[:-1] for name in CONCEPT_TENSORS}, last_output=False)

    def _flaw(self) -> str | None:
        return concepts_flaw(self.vectors, self.scale)

    def _origins(self) -> list[dict[str, Any]]:
        concepts = self.provenance.get("concepts")
        found = [concepts.get(name) for name in self.names] if isinstance(concepts, dict) else []
        return [one if isinstance(one, dict) else {} for one in found]

    @classmethod
    def extract(
        cls,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        positive: Sequence[str],
        negative: Sequence[str],
        *,
        name: str,
        held_out: ContrastPrompts | None = None,
        chat: ChatSettings | None = None,
        batch_size: int = 32,
        progress: bool = True,
    ) -> Directions:
        """Difference in means between two sets of prompts at their last token, block by block, as unit vectors.

        The same as :meth:`RefusalDirections.extract`, for any concept; no refusals are looked for.

        Args:
            model, tokenizer: a chat model and its tokenizer.
            positive, negative: prompts that have the concept, and prompts that do not.
            name: of the concept, at most 40 letters, digits, ``_``, ``-`` and ``.``.
            held_out: prompts to measure :attr:`auroc` on, positive ones first. If not given, every fifth of each side
                is taken, and left out of the means; none if a side has fewer than ten.
            chat: how the model is asked: system prompt and variables of its chat template.

        Raises:
            ProConError: without prompts; for an invalid name; on hidden states that are not finite, or that are
                the same for both sides at every block.
        """
        check_name(name)
        refuse_unprepared(model)
        prompts = contrast(positive, negative)
        if held_out is None:
            prompts, held_out = hold_out(prompts)
        means = ContrastMeans.measure(
            model,
            tokenizer,
            prompts,
            called=("positive", "negative"),
            chat=chat,
            batch_size=batch_size,
            progress=progress,
        )
        unit, gap = means.contrast()
        if not gap.any():
            raise ProConError(f"positive and negative prompts of {name!r} give the same hidden states: pass others")
        vectors = unit.float()[:, None]
        quality = torch.full(vectors.shape[:2], torch.nan)
        if held_out is not None:
            z = [
                project_on_all(model, tokenizer, vectors, side, chat=chat, batch_size=batch_size, progress=progress)
                for side in (held_out.malicious, held_out.benign)
            ]
            quality = torch.where(gap[:, None] > 0, auroc(*z), torch.nan)
        known = {
            **provenance_of(model, tokenizer, chat),
            "prompts": prompts.hash,
            "held_out_prompts": None if held_out is None else held_out.hash,
            "counts": {"positive": len(prompts.malicious), "negative": len(prompts.benign)},
            "position": "last prompt token",
        }
        return cls(
            vectors=vectors,
            scale=gap.float()[:, None],
            auroc=quality,
            positive=(unit * means.malicious).sum(-1).float()[:, None],
            negative=(unit * means.benign).sum(-1).float()[:, None],
            names=(name,),
            length=(gap > 0).float()[:, None],
            bias=torch.zeros(len(gap), 1),
            threshold=torch.full((len(gap), 1), torch.nan),
            provenance={"concepts": {name: known}},
            last_output=True,
        )

    @classmethod
    def from_vectors(
        cls,
        model: nn.Module,
        vectors: Vectors,
        *,
        name: str,
        bias: Numbers = None,
        threshold: Numbers = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        positive: Sequence[str] = (),
        negative: Sequence[str] = (),
        chat: ChatSettings | None = None,
        batch_size: int = 32,
        progress: bool = True,
    ) -> Directions:
        """Directions along given vectors: a linear probe, a persona vector, a row of an SAE's decoder.

        Args:
            model: the model whose hidden states the vectors belong to; later, another model is refused.
            vectors: ``{block: vector [D]}`` for some blocks, or a tensor ``[L, D]`` for all, whose zero rows are left
                out. A vector stands for the input of its block; that of ``"last"``, or of block L, for the output of
                the last block. Of any length: the constraint takes unit vectors.
            name: of the concept, at most 40 letters, digits, ``_``, ``-`` and ``.``.
            bias, threshold: of a linear probe, whose score is ``<vector, x> + bias`` and which says yes above the
                threshold: one number for all blocks that have a vector, ``{block: number}``, or ``[L]``.
            tokenizer, positive, negative: prompts that have the concept, and prompts that do not. The distance of their
                means along each vector is its unit, and its AUROC is measured on them. Without them the vectors have
                no unit, and the constraint takes ``units="raw"`` alone.
            chat: how the model is asked with them: system prompt and variables of its chat template.

        Raises:
            ProConError: for a vector of another width, of zeros or not finite, or of a block that is not there; for a
                bias or a threshold without a vector; for an invalid name.
        """
        check_name(name)
        decoder = find_decoder(model)
        given = GivenVectors.read(vectors, bias, threshold, len(decoder.blocks), decoder.hidden_size)
        unit = (given.vectors / given.length.clamp_min(torch.finfo(torch.float64).tiny)[:, None]).float()[:, None]
        there = given.length > 0
        unknown = torch.full((len(there), 1), torch.nan)
        found = cls(
            vectors=unit,
            scale=torch.where(there[:, None], torch.nan, 0.0),
            auroc=unknown,
            positive=unknown,
            negative=unknown,
            names=(name,),
            length=given.length.float()[:, None],
            bias=given.bias.float()[:, None],
            threshold=given.threshold.float()[:, None],
            provenance={"concepts": {name: {**provenance_of(model, tokenizer, chat), "given": True}}},
            last_output=True,
        )
        if not positive and not negative:
            return found
        if tokenizer is None:
            raise ProConError("prompts are given without a tokenizer: pass tokenizer as well, to read them with")
        return found._with_units(model, tokenizer, contrast(positive, negative), batch_size, progress, chat)

    def _with_units(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        prompts: ContrastPrompts,
        batch_size: int,
        progress: bool,
        chat: ChatSettings | None,
    ) -> Directions:
        """These of one concept, with what is measured on prompts that have it and prompts that do not."""
        asked = {"chat": chat, "batch_size": batch_size, "progress": progress}
        means = ContrastMeans.measure(model, tokenizer, prompts, called=("positive", "negative"), **asked)
        sides = (prompts.malicious, prompts.benign)
        z = [project_on_all(model, tokenizer, self.vectors, side, **asked) for side in sides]
        unit = self.vectors[:, 0].double()
        positive, negative = ((unit * mean).sum(-1)[:, None] for mean in (means.malicious, means.benign))
        distance = (positive - negative).abs()
        # A vector may point to either side. If both are at the same place along it, it has no unit.
        scale = torch.where(distance > DEAD_GAP * means.scale[:, None], distance, torch.nan).float()
        there = self.vectors.any(-1)
        (name,) = self.names
        known = {
            **self.provenance["concepts"][name],
            "prompts": prompts.hash,
            "counts": {"positive": len(prompts.malicious), "negative": len(prompts.benign)},
            "position": "last prompt token",
        }
        return replace(
            self,
            scale=torch.where(there, scale, 0.0),
            auroc=torch.where(there, auroc(*z), torch.nan),
            positive=torch.where(there, positive.float(), torch.nan),
            negative=torch.where(there, negative.float(), torch.nan),
            provenance={"concepts": {name: known}},
        )

    @classmethod
    def combine(cls, *parts: BlockDirections) -> Directions:
        """The concepts of all parts, in their order; refusal directions are a part like others.

        Raises:
            ProConError: for parts of different models' shapes, two concepts of one name, or more than 8 in all.
        """
        if not parts:
            raise ProConError("no directions to combine: give one part at least")
        found = [_rows_for(cls.of(part), any(other.last_output for other in parts)) for part in parts]
        shapes = {(one.block_count, one.vectors.shape[2]) for one in found}
        if len(shapes) > 1:
            described = " and ".join(f"{blocks} blocks of width {width}" for blocks, width in sorted(shapes))
            raise ProConError(f"directions for {described} cannot be combined: take those of one model")
        names = tuple(name for one in found for name in one.names)
        if len(names) > MAX_DIRECTIONS:
            raise ProConError(f"{len(names)} concepts are too many: combine {MAX_DIRECTIONS} at most")
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice:
            raise ProConError(f"two concepts are named {twice[0]!r}: give each a name of its own")
        tensors = {name: torch.cat([getattr(one, name) for one in found], 1) for name in CONCEPT_TENSORS}
        concepts = {
            name: part for one in found for name, part in zip(one.names, one._origins() or [{}] * one.k, strict=True)
        }
        return cls(**tensors, names=names, provenance={"concepts": concepts}, last_output=found[0].last_output)

    @classmethod
    def of(cls, directions: BlockDirections) -> Directions:
        """Refusal directions as directions of concepts: ``refusal``, and ``refusal_2`` and on if they are several."""
        if isinstance(directions, Directions):
            return directions
        assert isinstance(directions, RefusalDirections)  # noqa: S101  # for the type checker: there are two kinds
        first = torch.arange(directions.k) == 0
        there = directions.basis.any(-1)

        def of_first(values: Tensor) -> Tensor:
            return torch.where(there & first, values[:, None], torch.nan)

        return cls(
            vectors=directions.basis,
            scale=directions.gaps,
            auroc=of_first(directions.auroc),
            positive=of_first(directions.malicious),
            negative=of_first(directions.benign),
            names=directions.concepts,
            length=there.float(),
            bias=torch.zeros(there.shape),
            threshold=torch.full(there.shape, torch.nan),
            provenance={"concepts": dict.fromkeys(directions.concepts, directions.provenance)},
            last_output=directions.last_output,
        )

    def save(self, path: str | Path) -> Path:
        tensors = {name: getattr(self, name) for name in CONCEPT_TENSORS}
        known = self._origins() or [{}] * self.k
        return write(
            path, tensors, {"concepts": dict(zip(self.names, known, strict=True)), "last_output": self.last_output}
        )

    @classmethod
    def load(cls, path: str | Path) -> Directions:
        """Read what :meth:`save` wrote, or a file of refusal directions; of a folder, the file beside a model.

        Raises:
            ProConError: if the file is missing or damaged, or holds something else than unit directions.
        """
        return cls.of(load_directions(path))

    @classmethod
    def _of(cls, path: Path, tensors: dict[str, Tensor], provenance: dict[str, Any]) -> Directions:
        concepts = provenance.get("concepts")
        shape = tuple(tensors["vectors"].shape)
        fits = isinstance(concepts, dict) and len(shape) == 3 and shape[1] == len(concepts) <= MAX_DIRECTIONS
        if not fits or not all(tensors[name].shape == shape[:2] for name in CONCEPT_TENSORS[1:]):
            shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
            raise ProConError(
                f"directions file {str(path)!r} holds {shapes}, not [L, K, D] and [L, K] of K concepts with names, K "
                f"at most {MAX_DIRECTIONS}: make it again"
            )
        for name in concepts or ():
            check_name(name)
        last = provenance.pop("last_output", False) is True
        found = cls(**tensors, names=tuple(concepts or ()), provenance=provenance, last_output=last)
        if reason := found._flaw():
            raise ProConError(f"directions file {str(path)!r} holds {reason}: make it again")
        return found


def load_directions(path: str | Path) -> BlockDirections:
    """Directions of either kind from a file; of a folder, from the one that training leaves beside a model.

    Raises:
        ProConError: if the file is missing or damaged, or holds something else than unit directions.
    """
    path = Path(path)
    path = path / DIRECTIONS if os.path.isdir(path) else path
    tensors, provenance = read(path)
    return (RefusalDirections if "directions" in tensors else Directions)._of(path, tensors, provenance)


def _rows_for(directions: Directions, last_output: bool) -> Directions:
    """These with a row for the last block's output, in which nothing stands, if others have one."""
    if directions.last_output or not last_output:
        return directions
    one = directions.vectors.shape[1]
    fill = {"auroc": torch.nan, "positive": torch.nan, "negative": torch.nan, "threshold": torch.nan}
    rows = {
        name: torch.cat([getattr(directions, name), torch.full((1, one), fill.get(name, 0.0))])
        for name in CONCEPT_TENSORS[1:]
    }
    vectors = torch.cat([directions.vectors, torch.zeros_like(directions.vectors[:1])])
    return replace(directions, vectors=vectors, **rows, last_output=True)
