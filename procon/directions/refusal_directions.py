"""Refusal directions: extract, save, load, compare."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from procon.chat import ContrastPrompts, builtin_prompts, measure_refusal
from procon.directions import controls
from procon.directions.block_directions import DIRECTIONS, BlockDirections
from procon.directions.contrast_means import DEAD_GAP, ContrastMeans
from procon.directions.file import FURTHER, TENSORS, read, write
from procon.directions.projections import auroc, project_last_token
from procon.directions.provenance import provenance_of
from procon.directions.soundness import flaw
from procon.directions.subspace import further_directions, mean_squared_cosine
from procon.errors import ProConError
from procon.models import refuse_unprepared
from procon.settings import MAX_DIRECTIONS, ChatSettings


@dataclass(frozen=True)
class RefusalDirections(BlockDirections):
    """One unit direction per block, at the block's input (paper section III-A), or several.

    Those found by this version have one more row than the model has blocks: that of the output of the last block,
    before the final norm. Below, ``L`` is the number of rows.

    Attributes:
        first: ``[L, D]`` fp32, unit rows; a zero row where the prompts do not differ (see :attr:`usable`).
        gap: ``[L]`` fp32, distance between the malicious and the benign mean, in units of the hidden states.
        auroc: ``[L]`` fp32, how well the projection separates held-out malicious from benign prompts (0.5 is chance).
        malicious, benign: ``[L]`` fp32, projections of the two means, from which drift is measured.
        provenance: model id, revision and origin, chat template and prompt-set hashes, counts, versions, refusal rate.
        further: ``[L, K - 1, D]`` fp32, the other directions of K per block, orthonormal along with the first; None for
            one. All other fields describe the first direction only. A zero row if the categories do not differ further.
        last_output: whether the last row is that of the last block's output; files of earlier versions have none.
    """

    first: Tensor
    gap: Tensor
    auroc: Tensor
    malicious: Tensor
    benign: Tensor
    provenance: dict[str, Any] = field(default_factory=dict)
    further: Tensor | None = None
    last_output: bool = False

    @property
    def at_block_inputs(self) -> RefusalDirections:
        """These without the row of the last block's output: what is compared with other directions."""
        if not self.last_output:
            return self
        rows = {name: getattr(self, name)[:-1] for name in ("first", *TENSORS[1:])}
        further = None if self.further is None else self.further[:-1]
        return replace(self, **rows, further=further, last_output=False)

    @property
    def basis(self) -> Tensor:
        """``[L, K, D]`` fp32, all directions of each block."""
        first = self.first[:, None]
        return first if self.further is None else torch.cat([first, self.further], 1)

    @property
    def gaps(self) -> Tensor:
        """``[L, K]`` fp32, :attr:`gap` at each direction: further ones are in units of the same distance."""
        return torch.where(self.basis.any(-1), self.gap[:, None], 0.0)

    @property
    def concepts(self) -> tuple[str, ...]:
        """``refusal``, and ``refusal_2`` to ``refusal_K`` for the further ones."""
        return ("refusal", *(f"refusal_{number}" for number in range(2, self.k + 1)))

    @property
    def usable(self) -> Tensor:
        """``[L]`` bool: rows that have a direction."""
        return self.gap > 0

    @property
    def hash(self) -> str:
        """A short hash of the directions and their gaps."""
        data = self.first.numpy().tobytes() + self.gap.numpy().tobytes()
        if self.further is not None:
            data += self.further.numpy().tobytes()
        return hashlib.sha256(data).hexdigest()[:16]

    def cosine(self, other: RefusalDirections) -> Tensor:
        """Signed cosine to ``other`` (section III-B) at block inputs, of the first directions if there are several.

        Returns:
            ``[block_count]`` fp32, NaN where either has no direction.
        """
        one, two = self.at_block_inputs, other.at_block_inputs
        if one.first.shape != two.first.shape:
            raise ProConError(
                f"directions of shape {tuple(one.first.shape)} and {tuple(two.first.shape)} cannot be compared: "
                "extract both from the same architecture"
            )
        cosine = (one.first.double() * two.first.double()).sum(-1).float()
        return torch.where(one.usable & two.usable, cosine, torch.nan)

    def subspace_cosine(self, other: RefusalDirections) -> Tensor:
        """Mean squared cosine of the principal angles between the spans of the K directions of each block.

        Returns:
            ``[block_count]`` fp32, at most 1; the squared cosine for one direction; NaN where either has none.
        """
        inputs, others = self.at_block_inputs, other.at_block_inputs
        one, two = inputs.basis, others.basis
        if one.shape != two.shape:
            raise ProConError(
                f"directions of shape {tuple(one.shape)} and {tuple(two.shape)} span no subspaces to compare: extract "
                "as many per block, from the same architecture"
            )
        return torch.where(inputs.usable & others.usable, mean_squared_cosine(one, two).float(), torch.nan)

    def randomized(self, seed: int) -> RefusalDirections:
        """The control for *any* direction: isotropic random unit directions at the same blocks, with the same gaps.

        If this control preserves refusals too, the protection comes from anchoring hidden states along *any* direction.
        Hidden states vary little along most directions, so at the same alpha this control constrains the model less
        than the refusal directions do; :meth:`randomized_within` corrects for that.
        """
        return controls.randomized(self, seed)

    def randomized_within(self, hidden_states: Tensor, seed: int) -> RefusalDirections:
        """The control for a direction *in which hidden states vary*: random ones drawn with their covariance.

        Each is ``sum_i g_i (x_i - mean)`` for standard normal ``g``, scaled to unit length: a random contrast of the
        given states, just as the refusal direction is a contrast of prompt states. The same ``g`` is used at every
        block. Whatever the refusal directions preserve beyond this control is specific to them.

        Take states of benign text, best of what is trained on: those of malicious and benign prompts vary along the
        refusal direction itself, and the draws lean to it (see :meth:`cosine`). If few dimensions hold most of the
        variance, as the massive ones do at a sequence's first token, draws lean to those, and to each other.

        Args:
            hidden_states: ``[n, L, D]`` of any floating dtype, inputs of each block at n tokens, n above K. The control
                has no row for the last block's output if they have none.

        Raises:
            ProConError: if they do not fit, are not finite, or do not vary at a block that has a direction.
        """
        return controls.randomized_within(self, hidden_states, seed)

    def shuffled(self, seed: int) -> RefusalDirections:
        """The control for the *right block*: each usable block has the directions of another, with its own gap.

        They are true refusal directions, but of other blocks. If this control preserves refusals too, the protection
        does not depend on the block. Neighbouring blocks have similar directions, so look at :meth:`cosine` first:
        this control is the weaker the closer it is to 1.

        Raises:
            ProConError: if fewer than two blocks have a direction.
        """
        return controls.shuffled(self, seed)

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file with provenance and a checksum in its header; returns its path."""
        tensors = {"directions": self.first, **{name: getattr(self, name) for name in TENSORS[1:]}}
        if self.further is not None:
            tensors[FURTHER] = self.further
        return write(path, tensors, self.provenance | ({"last_output": True} if self.last_output else {}))

    @classmethod
    def load(cls, path: str | Path) -> RefusalDirections:
        """Read what :meth:`save` wrote; of a folder, the file that training leaves beside a model.

        A file of a version without checksums is read with a warning.

        Raises:
            ProConError: if the file is missing or damaged, or holds something else than unit directions.
        """
        path = Path(path)
        path = path / DIRECTIONS if os.path.isdir(path) else path
        return cls._of(path, *read(path))

    @classmethod
    def _of(cls, path: Path, tensors: dict[str, Tensor], provenance: dict[str, Any]) -> RefusalDirections:
        if "directions" not in tensors:
            raise ProConError(
                f"directions file {str(path)!r} holds directions of other concepts: load it with "
                "procon.Directions.load, and give what takes refusal directions alone another file"
            )
        shape = tuple(tensors["directions"].shape)
        fits = len(shape) == 2 and all(tensors[name].shape == shape[:1] for name in TENSORS[1:])
        if fits and FURTHER in tensors:
            further = tensors[FURTHER].shape
            fits = len(further) == 3 and further[::2] == shape and 1 <= further[1] < MAX_DIRECTIONS
        if not fits:
            shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
            raise ProConError(
                f"directions file {str(path)!r} holds {shapes}, not [L, D] and [L], or [L, K - 1, D] of further "
                f"directions with K at most {MAX_DIRECTIONS}: extract it again"
            )
        last = provenance.pop("last_output", False) is True
        found = cls(first=tensors.pop("directions"), **tensors, provenance=provenance, last_output=last)
        if reason := found._flaw():
            raise ProConError(f"directions file {str(path)!r} holds {reason}: extract it again")
        return found

    def _flaw(self) -> str | None:
        return flaw(self.basis, self.gap, self.malicious, self.benign)

    def _origins(self) -> list[dict[str, Any]]:
        return [self.provenance]

    @classmethod
    def from_means(cls, means: ContrastMeans, k: int = 1) -> RefusalDirections:
        """Difference in means, scaled to unit length; without quality figures and provenance.

        Args:
            k: directions per block; more than one need :attr:`ContrastMeans.differences` of at least ``k`` categories.

        Raises:
            ProConError: if the two sides' means are the same at every block.
        """
        unit, gap = means.contrast()
        usable = gap > 0
        if not usable.any():
            raise ProConError("malicious and benign prompts give the same hidden states: pass prompts that differ")
        further = None
        if k > 1:
            assert means.differences is not None  # noqa: S101  # for the type checker: k fits the prompts
            further = further_directions(unit, means.differences, k - 1, DEAD_GAP * means.scale)
            further = torch.where(usable[:, None, None], further, 0.0).float()
        return cls(
            first=unit.float(),
            gap=gap.float(),
            auroc=torch.full_like(gap, torch.nan).float(),
            malicious=(unit * means.malicious).sum(-1).float(),
            benign=(unit * means.benign).sum(-1).float(),
            further=further,
            last_output=means.last_output,
        )

    @classmethod
    def extract(
        cls,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        prompts: ContrastPrompts | None = None,
        *,
        k: int = 1,
        held_out: ContrastPrompts | None = None,
        chat: ChatSettings | None = None,
        batch_size: int = 32,
        check_refusal: bool = True,
        progress: bool = True,
    ) -> RefusalDirections:
        """Difference in means at the last prompt token, block by block, scaled to unit length (section III-A).

        The row after those of the block inputs is that of the last block's output.

        Args:
            model: a chat model; used in eval mode, without gradients, through its base decoder only.
            tokenizer: its tokenizer, with a chat template.
            prompts: contrast prompts to extract from; the built-in ones if not given.
            k: directions per block. The first is that of ``k=1``; the further ones are how the prompts' categories
                depart from it (:mod:`procon.directions.subspace`).
            held_out: prompts to measure :attr:`auroc` on; the built-in held-out ones if not given.
            chat: how the model is asked: system prompt, variables of its chat template, markers of its thoughts.
            check_refusal: generate replies to some malicious prompts first, and warn if less than half are refused.

        Memory: one block's input at a time, plus ``2 * L * D`` fp64 sums, those of each category too with ``k > 1``.

        Raises:
            ProConError: for a ``k`` that is not 1 to 8, or above the number of categories; on hidden states that are
                not finite, a tokenizer without chat template, no usable block, or a model that DeepSpeed ZeRO-3 has
                partitioned and not prepared.
        """
        prompts = prompts or builtin_prompts("extraction")
        held_out = held_out or builtin_prompts("held_out")
        check_k(k, prompts)
        refuse_unprepared(model)
        rate = None
        if check_refusal:
            rate = measure_refusal(
                model, tokenizer, prompts.malicious, chat=chat, batch_size=batch_size, progress=progress
            )
        means = ContrastMeans.measure(
            model, tokenizer, prompts, by_category=k > 1, chat=chat, batch_size=batch_size, progress=progress
        )
        found = cls.from_means(means, k)
        z_malicious, z_benign = (
            project_last_token(model, tokenizer, found, side, chat=chat, batch_size=batch_size, progress=progress)
            for side in (held_out.malicious, held_out.benign)
        )
        provenance = {
            **provenance_of(model, tokenizer, chat),
            "prompts": prompts.hash,
            "held_out_prompts": held_out.hash,
            "counts": {"malicious": len(prompts.malicious), "benign": len(prompts.benign)},
            "position": "last prompt token",
            "refusal_rate": rate,
        }
        if k > 1:
            provenance["directions_a_block"] = k
        return replace(found, auroc=auroc(z_malicious, z_benign), provenance=provenance)


def check_k(k: int, prompts: ContrastPrompts) -> None:
    """Raise ProConError unless ``k`` directions per block can be found from the prompts' categories."""
    if not 1 <= k <= MAX_DIRECTIONS:
        raise ProConError(f"k is {k}: give 1 to {MAX_DIRECTIONS} directions per block")
    categories = len(set(prompts.categories))
    if k > 1 and categories < k:
        raise ProConError(
            f"k is {k}, but the prompts have {categories} categories: give prompts with as many at least, as the "
            "built-in ones, or k=1"
        )
