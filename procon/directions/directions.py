"""Directions of refusal, or of any other concept: what they are, where they come from, and their file."""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from procon.chat import ContrastPrompts, builtin_prompts, describe_chat, measure_refusal, template_hash
from procon.directions.extraction import (
    DEAD_GAP,
    ContrastMeans,
    auroc,
    further_directions,
    hold_out,
    project_last_token,
    provenance_of,
)
from procon.errors import ProConError
from procon.files import write_bytes
from procon.models import Decoder, Relation, compare_origin, find_decoder, origin_of, refuse_unprepared
from procon.settings import MAX_DIRECTIONS, ChatSettings

#: The file's name if it stands beside a model or an adapter, where vLLM takes ".safetensors" for weights.
DIRECTIONS_FILE = "refusal-directions.procon"

#: Vectors by the block, or a row for each.
Vectors = Tensor | Mapping[int, Tensor]

_REFUSAL = "refusal"
_TENSORS = ("basis", "gaps", "auroc", "positive", "negative")
_UNMEASURED = torch.tensor(torch.nan)

#: How far from 1 a length may be: bfloat16 rounds each value by 2**-9 of it at most.
_TOLERANCE = 2**-8


@dataclass(frozen=True)
class Directions:
    """``K`` unit directions for the input of each of ``L`` blocks.

    They are refusal directions, or those of other concepts, which need not be at right angles to each other.

    Attributes:
        basis: ``[L, K, D]`` fp32, unit vectors, or zeros where there is none.
        gaps: ``[L, K]`` fp32, the unit that drift has: the distance between the means of two sets of prompts, in units
            of the hidden states. 0 if there is no direction, NaN if there were no prompts.
        auroc: ``[L, K]`` fp32, how well the projection separates held-out prompts of both sets; NaN if not measured.
        positive, negative: ``[L, K]`` fp32, projections of the means of both sets: the prompts that have the concept,
            as malicious ones have refusal, and those that do not; NaN if not measured.
        concepts: ``K`` names, of what each direction stands for; ``refusal``, ``refusal_2`` and on if not given.
        provenance: model id, revision and origin, chat template and prompt-set hashes, counts, versions, refusal rate.
    """

    basis: Tensor
    gaps: Tensor
    auroc: Tensor = _UNMEASURED
    positive: Tensor = _UNMEASURED
    negative: Tensor = _UNMEASURED
    concepts: tuple[str, ...] = ()
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in _TENSORS[2:]:
            object.__setattr__(self, name, getattr(self, name).expand(self.gaps.shape))
        if not self.concepts:
            object.__setattr__(self, "concepts", numbered(_REFUSAL, self.k))

    @classmethod
    def extract(
        cls,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        prompts: ContrastPrompts | None = None,
        *,
        name: str = _REFUSAL,
        k: int = 1,
        held_out: ContrastPrompts | None = None,
        chat: ChatSettings | None = None,
        batch_size: int = 32,
        check_refusal: bool = True,
        progress: bool = True,
    ) -> Directions:
        """Difference in means at the last prompt token, block by block, scaled to unit length (paper section III-A).

        Args:
            model: a chat model; used in eval mode, without gradients.
            tokenizer: its tokenizer, with a chat template.
            prompts: of refusal, the built-in ones if not given. Those of another concept are
                ``ContrastPrompts(positive, negative)``: prompts that have it, and prompts that do not.
            name: of the concept, at most 40 letters, digits, ``_``, ``-`` and ``.``.
            k: directions per block. The first is that of ``k=1``; the further ones are how the prompts' categories
                depart from it (:func:`procon.directions.extraction.further_directions`).
            held_out: prompts to measure :attr:`auroc` on. If not given: for refusal, the built-in held-out ones; for
                another concept every fifth of each side, left out of the means, and none if a side has fewer than ten.
            chat: how the model is asked: system prompt, variables of its chat template, markers of its thoughts.
            check_refusal: for refusal, generate replies to some malicious prompts first, and warn if less than half are
                refused.

        Raises:
            ProConError: for a ``k`` that is not 1 to 8, or above the number of categories; for an invalid name; on
                hidden states that are not finite or all alike, a tokenizer without chat template, or a model that
                cannot run yet.
        """
        if name == _REFUSAL:
            prompts = prompts or builtin_prompts("extraction")
            held_out = held_out or builtin_prompts("held_out")
        elif prompts is None:
            raise ProConError(f"no prompts of {name!r} are given: pass ContrastPrompts(positive, negative)")
        elif held_out is None:
            prompts, held_out = hold_out(prompts)
        check_k(k, prompts)
        check_concepts(numbered(name, k))
        refuse_unprepared(model)
        asked: dict[str, Any] = {"chat": chat, "batch_size": batch_size, "progress": progress}
        check_refusal = check_refusal and name == _REFUSAL
        rate = measure_refusal(model, tokenizer, prompts.malicious, **asked) if check_refusal else None
        means = ContrastMeans.measure(model, tokenizer, prompts, by_category=k > 1, **asked)
        found = cls.from_means(means, k, name)
        quality = _UNMEASURED
        if held_out:
            sides = (held_out.malicious, held_out.benign)
            z = [project_last_token(model, tokenizer, found.basis, side, **asked) for side in sides]
            quality = torch.where(found.gaps != 0, auroc(*z), torch.nan)
        provenance = {
            **provenance_of(model),
            "chat_template": template_hash(tokenizer),
            "chat": describe_chat(tokenizer, chat),
            "prompts": prompts.hash,
            "counts": {"positive": len(prompts.malicious), "negative": len(prompts.benign)},
            "position": "last prompt token",
            "held_out_prompts": held_out and held_out.hash,
            "refusal_rate": rate,
        }
        return replace(found, auroc=quality, provenance=provenance)

    @classmethod
    def from_means(cls, means: ContrastMeans, k: int = 1, name: str = _REFUSAL) -> Directions:
        """Difference in means, scaled to unit length; without AUROC and provenance.

        Args:
            k: directions per block; more than one need :attr:`ContrastMeans.differences` of at least ``k`` categories.

        Raises:
            ProConError: if the two sides' means are the same at every block.
        """
        unit, gap = means.contrast()
        if not gap.any():
            raise ProConError("both sides of the prompts give the same hidden states: pass prompts that differ")
        basis = unit[:, None]
        if k > 1:
            assert means.differences is not None  # noqa: S101  # for the type checker: k fits the prompts
            further = further_directions(unit, means.differences, k - 1, DEAD_GAP * means.scale)
            basis = torch.cat([basis, torch.where(gap[:, None, None] > 0, further, 0.0)], 1)
        return cls(
            basis.float(),
            torch.where(basis.any(-1), gap[:, None], 0.0).float(),
            positive=(basis * means.malicious[:, None]).sum(-1).float(),
            negative=(basis * means.benign[:, None]).sum(-1).float(),
            concepts=numbered(name, k),
        )

    @classmethod
    def from_vectors(cls, model: nn.Module, vectors: Vectors, *, name: str) -> Directions:
        """Directions along given vectors: a linear probe, a persona vector, a row of an SAE's decoder.

        Args:
            model: the model whose hidden states the vectors belong to; later, another model is refused.
            vectors: ``{block: vector [D]}`` for the inputs of some blocks, or a tensor ``[L, D]`` for all; zeros are
                left out. Of any length: the constraint takes unit vectors.
            name: of the concept, at most 40 letters, digits, ``_``, ``-`` and ``.``.

        Raises:
            ProConError: for a vector of another width, not finite, or of a block that is not there; for an invalid
                name.
        """
        check_concepts((name,))
        decoder = find_decoder(model)
        given = rows_of(vectors, len(decoder.blocks), decoder.hidden_size)[:, None]
        length = given.norm(dim=-1)
        return cls(
            (given / length.clamp_min(torch.finfo(torch.float64).tiny)[..., None]).float(),
            torch.where(length > 0, torch.nan, 0.0),
            concepts=(name,),
            provenance={**provenance_of(model), "given": True},
        )

    @property
    def k(self) -> int:
        """Number of directions per block."""
        return self.basis.shape[1]

    @property
    def block_count(self) -> int:
        """Number of blocks of the model."""
        return len(self.basis)

    @property
    def usable(self) -> Tensor:
        """``[L]`` bool: blocks that have a direction."""
        return (self.gaps != 0).any(-1)

    @property
    def of_refusal(self) -> bool:
        """Whether all of them are refusal directions."""
        return self.concepts == numbered(_REFUSAL, self.k)

    @property
    def hash(self) -> str:
        """A short hash of the directions and their gaps."""
        data = self.basis.numpy().tobytes() + self.gaps.numpy().tobytes()
        return hashlib.sha256(data).hexdigest()[:16]

    def cosine(self, other: Directions) -> Tensor:
        """Signed cosine to ``other`` (section III-B), of the first directions if there are several.

        Returns:
            ``[L]`` fp32, NaN where either has no direction.
        """
        one, two = self.basis[:, 0], other.basis[:, 0]
        if one.shape != two.shape:
            raise ProConError(
                f"directions of shape {tuple(one.shape)} and {tuple(two.shape)} cannot be compared: extract both from "
                "the same architecture"
            )
        there = (self.gaps[:, 0] != 0) & (other.gaps[:, 0] != 0)
        return torch.where(there, (one.double() * two.double()).sum(-1).float(), torch.nan)

    def check_fits(self, decoder: Decoder) -> None:
        """Raise ProConError unless these are unit directions of width ``D`` for each block of ``decoder``."""
        blocks, width = self.block_count, self.basis.shape[2]
        if (blocks, width) != (len(decoder.blocks), decoder.hidden_size):
            raise ProConError(
                f"directions are for {blocks} blocks of width {width}, but the model has {len(decoder.blocks)} blocks "
                f"of width {decoder.hidden_size}: extract directions from this model with 'procon directions'"
            )
        if reason := self._flaw():
            raise ProConError(f"directions hold {reason}: extract them again with 'procon directions'")

    def check_origin(self, model: nn.Module) -> Relation:
        """Compare ``model``, as it now is, with the one that directions were extracted from, if that is known.

        The same weights in float32 and bfloat16 are the same, and so is a fresh LoRA adapter on them. If weights are
        sharded, all ranks must call.

        Returns:
            "same"; "other weights" of the same model, with a warning; or "unknown". ProConError if it is another model.
        """
        relation, name = compare_origin(self.provenance.get("origin"), origin_of(model)), self.provenance.get("model")
        if relation == "another model":
            raise ProConError(
                f"directions were extracted from another model ({name!r}), whose embeddings are unrelated to this "
                "one's: extract directions from this model with 'procon directions'"
            )
        if relation == "other weights":
            warnings.warn(
                f"directions were extracted from other weights ({name!r}) than the model's: that is right if it was "
                "quantised, or an adapter merged or taken off; if it was trained since, extract directions again",
                stacklevel=2,
            )
        return relation

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file with names, provenance and a checksum in its header; returns its path.

        Equal directions make equal files.
        """
        # Copies, as safetensors refuses tensors that share memory.
        tensors = {name: getattr(self, name).clone(memory_format=torch.contiguous_format) for name in _TENSORS}
        about = {"concepts": self.concepts, "provenance": self.provenance}
        # One entry, since safetensors puts several in an order that chance gives.
        text = json.dumps(about | {"checksum": _checksum(tensors, about)})
        return write_bytes(save(tensors, {"procon": text}), path)

    @classmethod
    def load(cls, path: str | Path) -> Directions:
        """Read what :meth:`save` wrote; of a folder, the file that training leaves beside a model.

        Raises:
            ProConError: if the file is missing or damaged, or holds something else than unit directions.
        """
        path = Path(path)
        path = path / DIRECTIONS_FILE if os.path.isdir(path) else path
        if not os.path.isfile(path):
            raise ProConError(f"directions file {str(path)!r} does not exist: make it with 'procon directions'")
        try:
            with safe_open(path, "pt") as file:
                about = json.loads((file.metadata() or {})["procon"])
                # Copies: what is loaded does not follow the file, which is mapped into memory.
                tensors = {name: file.get_tensor(name).clone() for name in _TENSORS}
            if about.pop("checksum") != _checksum(tensors, about):
                raise ValueError("its checksum differs")
            if not isinstance(about["provenance"], dict) or not about["concepts"]:
                raise TypeError("it holds other values")
            about["concepts"] = tuple(about["concepts"])
            check_concepts(about["concepts"])
            found = cls(**{name: tensor.float() for name, tensor in tensors.items()}, **about)
            if reason := found._flaw():
                raise ValueError(f"it holds {reason}")
        # What safetensors, json and torch raise on such bytes.
        except (SafetensorError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, OSError) as error:
            raise ProConError(
                f"directions file {str(path)!r} is damaged or not one of ProCon's ({error}): extract it again"
            ) from error
        return found

    def _flaw(self) -> str | None:
        """What is wrong with the values; None if nothing is. At a block they are unit vectors, or there is none."""
        if self.basis.dim() != 3 or self.gaps.shape != self.basis.shape[:2] or self.k != len(self.concepts):
            shapes = f"{tuple(self.basis.shape)} and {tuple(self.gaps.shape)}"
            return f"tensors of shape {shapes} for {len(self.concepts)} concepts, not [L, K, D] and [L, K]"
        lengths = self.basis.double().norm(dim=-1)
        if not torch.isfinite(lengths).all() or self.gaps.isinf().any() or (self.gaps < 0).any():
            return "NaN, infinite or negative values"
        if not self.usable.any():
            return "no direction for any block"
        wrong = ((lengths - (self.gaps != 0).double()).abs() > _TOLERANCE).any(-1).nonzero()
        if len(wrong):
            return f"no unit vector beside a gap, or a vector beside none, for block {int(wrong[0])}"
        return None


def numbered(name: str, k: int) -> tuple[str, ...]:
    """Names of ``k`` directions of one concept."""
    return (name, *(f"{name}_{number}" for number in range(2, k + 1)))


def check_k(k: int, prompts: ContrastPrompts) -> None:
    """Raise ProConError unless ``k`` directions per block can be found from the prompts' categories."""
    most = max(1, min(MAX_DIRECTIONS, len(set(prompts.categories))))
    if not 1 <= k <= most:
        raise ProConError(f"k is {k}: give 1 to {most} directions per block, or prompts of more categories")


def _checksum(tensors: dict[str, Tensor], about: dict[str, Any]) -> str:
    digest = hashlib.blake2b(json.dumps(about).encode(), digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_concepts(names: Sequence[object]) -> None:
    """Raise ProConError for a name that cannot stand in logs, files and tables."""
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]{1,40}", name):
            raise ProConError(f"the name of a concept is {name!r:.80}: give 1 to 40 letters, digits, '_', '-' and '.'")


def rows_of(vectors: Vectors, blocks: int, width: int) -> Tensor:
    """``[blocks, width]`` fp64, zeros where no vector is given; ProConError for what does not fit such a model."""
    given: dict[Any, Tensor] = dict(enumerate(vectors) if isinstance(vectors, Tensor) else vectors)
    rows = torch.zeros(blocks, width, dtype=torch.float64)
    for block, vector in given.items():
        vector = torch.as_tensor(vector).detach().cpu().double()
        if block not in range(blocks) or vector.shape != (width,) or not torch.isfinite(vector).all():
            raise ProConError(
                f"the vector of block {block!r:.40} has shape {tuple(vector.shape)} or is not finite, and the model "
                f"has {blocks} blocks of width {width}: give finite ones for indices below {blocks}"
            )
        rows[block] = vector
    if not rows.any() or (isinstance(vectors, Tensor) and len(given) < blocks):
        raise ProConError(f"too few vectors are given, or zeros alone: name blocks, or give {blocks} rows")
    return rows
