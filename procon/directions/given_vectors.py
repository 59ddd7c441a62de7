"""Vectors that a user gives, for some blocks or for all, and the file that they come in."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from procon.errors import ProConError
from procon.settings import LAST

#: By the block, or one for each.
Vectors = Tensor | Mapping[Any, Tensor]
Numbers = float | Tensor | Sequence[float] | Mapping[Any, float] | None


@dataclass(frozen=True)
class GivenVectors:
    """One row for each of ``L + 1`` sites, in fp64.

    Attributes:
        vectors: ``[L + 1, D]``, zeros where there is none.
        length: ``[L + 1]``, of the vectors.
        bias, threshold: ``[L + 1]``; 0 and NaN where there is none.
    """

    vectors: Tensor
    length: Tensor
    bias: Tensor
    threshold: Tensor

    @classmethod
    def read(cls, vectors: Vectors, bias: Numbers, threshold: Numbers, blocks: int, width: int) -> GivenVectors:
        """Those of a model of so many blocks and that width.

        Raises:
            ProConError: for what does not fit it, is not finite, or is zero.
        """
        rows = torch.zeros(blocks + 1, width, dtype=torch.float64)
        for site, vector in _by_site(vectors, "vectors", blocks).items():
            vector = torch.as_tensor(vector).detach().cpu()
            if vector.shape != (width,):
                raise ProConError(
                    f"the vector of {_said(site, blocks)} has shape {tuple(vector.shape)}, but the model has hidden "
                    f"states of width {width}: give vectors of that width"
                )
            if not torch.isfinite(vector.double()).all():
                raise ProConError(f"the vector of {_said(site, blocks)} is NaN or infinite: give finite numbers")
            if not vector.any() and not isinstance(vectors, Tensor):
                raise ProConError(f"the vector of {_said(site, blocks)} is zero: leave the block out")
            rows[site] = vector.double()
        there = rows.any(-1)
        if not there.any():
            raise ProConError("no vectors are given, or zeros alone: give a vector for at least one block")
        numbers = [
            _numbers(values, what, there, missing)
            for what, values, missing in (("bias", bias, 0.0), ("threshold", threshold, torch.nan))
        ]
        return cls(rows, rows.norm(dim=-1), *numbers)


def _numbers(values: Numbers, what: str, there: Tensor, missing: float) -> Tensor:
    """One number per site, ``missing`` where none is given."""
    found = torch.full(there.shape, missing, dtype=torch.float64)
    if values is None:
        return found
    if not isinstance(values, Sequence | Mapping) and (not isinstance(values, Tensor) or values.dim() == 0):
        found[there] = _number(values, what)
        return found
    for site, value in _by_site(values, what, len(there) - 1).items():
        if there[site]:
            found[site] = _number(value, what)
        elif isinstance(values, Mapping):
            raise ProConError(f"{what} is given for {_said(site, len(there) - 1)}, which has no vector: leave it out")
    return found


def _number(value: Any, what: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError):
        number = torch.nan
    if not abs(number) < torch.finfo(torch.float32).max:
        raise ProConError(f"{what} is {value!r:.60}: give a finite number")
    return number


def _by_site(values: Any, what: str, blocks: int) -> dict[int, Any]:
    """What is given, by the index of its site."""
    if not isinstance(values, Mapping):
        rows = list(values) if isinstance(values, Sequence) or (isinstance(values, Tensor) and values.dim()) else []
        if len(rows) not in (blocks, blocks + 1):
            raise ProConError(
                f"{what} has {len(rows)} rows, but the model has {blocks} blocks: give one for each, or name the blocks"
            )
        return dict(enumerate(rows))
    found = {}
    for name, value in values.items():
        site = blocks if name == LAST else name
        if isinstance(site, bool) or not isinstance(site, int) or not 0 <= site <= blocks:
            raise ProConError(
                f"{what} names block {name!r:.40}, but the model has {blocks}: give indices below {blocks}, or 'last' "
                "for the output of the last block"
            )
        found[site] = value
    return found


def _said(site: int, blocks: int) -> str:
    return f"block {site}" if site < blocks else "the last block's output"


def load_vectors(path: str | Path) -> dict[str, Any]:
    """Vectors, bias and threshold from a safetensors file, as :meth:`Directions.from_vectors` takes them.

    The file has a tensor ``vectors``, ``[L, D]``; or one of ``[D]`` for each block, named by its index, such as ``14``,
    or ``last``. Beside them it may have ``bias`` and ``threshold``, one number or ``[L]``, or ``14.bias`` and
    ``14.threshold``.

    Raises:
        ProConError: if the file is missing or damaged, or has other names.
    """
    path = Path(path)
    if not os.path.isfile(path):
        raise ProConError(f"vectors file {str(path)!r} does not exist")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise ProConError(f"vectors file {str(path)!r} is no safetensors file ({error}): save it as one") from error
    found: dict[str, Any] = {"vectors": {}, "bias": {}, "threshold": {}}
    for name, tensor in tensors.items():
        block, _, part = name.partition(".")
        part = part or "vectors"
        site = int(block) if block.isascii() and block.isdigit() else block
        if isinstance(found.get(name), dict) and not found[name]:
            found[name] = tensor
        elif (isinstance(site, int) or site == LAST) and isinstance(found.get(part), dict):
            found[part][site] = tensor
        else:
            raise ProConError(
                f"vectors file {str(path)!r} has {name!r:.60}: name tensors 'vectors', or by the block, such as "
                "'14'; and 'bias' and 'threshold', or '14.bias' and '14.threshold'"
            )
    return {name: values if isinstance(values, Tensor) or values else None for name, values in found.items()}
