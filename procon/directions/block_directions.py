"""What a constraint needs of directions, wherever they come from."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Self

from torch import Tensor, nn

from procon.errors import ProConError
from procon.models import Decoder, compare_origin
from procon.models.origin import Relation

#: The file's name where it stands beside a model or an adapter.
DIRECTIONS = "refusal-directions.safetensors"

#: From the one that decides to the one that says least.
_RELATIONS: tuple[Relation, ...] = ("another model", "other weights", "unknown", "same")


class BlockDirections(ABC):
    """``K`` directions for each of ``L`` rows: the inputs of the blocks, and perhaps the output of the last one.

    Attributes:
        provenance: what they were made from.
        last_output: whether the last row is that of the last block's output, before the final norm.
    """

    provenance: dict[str, Any]
    last_output: bool

    @property
    @abstractmethod
    def basis(self) -> Tensor:
        """``[L, K, D]`` fp32, all directions of each row: unit vectors, or zeros where there is none."""

    @property
    @abstractmethod
    def gaps(self) -> Tensor:
        """``[L, K]`` fp32, the unit of a departure along each direction under ``units="gap"``.

        The distance between the means of two sets of prompts; 0 if there is no direction, NaN if it is unknown.
        """

    @property
    @abstractmethod
    def concepts(self) -> tuple[str, ...]:
        """``K`` names, of what each direction stands for."""

    @property
    @abstractmethod
    def usable(self) -> Tensor:
        """``[L]`` bool: rows that have a direction."""

    @property
    @abstractmethod
    def hash(self) -> str:
        """A short hash of the directions and their gaps."""

    @property
    @abstractmethod
    def at_block_inputs(self) -> Self:
        """These without the row of the last block's output."""

    @abstractmethod
    def save(self, path: str | Path) -> Path:
        """Write a safetensors file with provenance and a checksum in its header; returns its path."""

    @abstractmethod
    def _flaw(self) -> str | None:
        """What is wrong with the values; None if nothing is."""

    @abstractmethod
    def _origins(self) -> list[dict[str, Any]]:
        """Provenance of each part that came from a model: what has ``model`` and ``origin``, if they are known."""

    @property
    def k(self) -> int:
        """Number of directions per block."""
        return self.basis.shape[1]

    @property
    def block_count(self) -> int:
        """Number of blocks of the model."""
        return len(self.basis) - self.last_output

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
            "same"; "other weights" of the same model, with a warning; or "unknown". Of several parts, what is worst.

        Raises:
            ProConError: if it is another model.
        """
        parts = [(part.get("origin"), str(part.get("model") or "unnamed")) for part in self._origins()]
        # Several concepts are often of one model, and comparing it takes a pass over its weights.
        different = [part for i, part in enumerate(parts) if part not in parts[:i]] or [(None, "unnamed")]
        found: list[tuple[Relation, str]] = [(compare_origin(origin, model), name) for origin, name in different]
        relation, name = sorted(found, key=lambda one: _RELATIONS.index(one[0]))[0]
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
