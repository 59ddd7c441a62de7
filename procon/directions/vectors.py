"""Vectors that a user gives, for some blocks or for all, the file that they come in, and the names of concepts."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from procon.errors import ProConError
from procon.settings import LAST, MAX_DIRECTIONS

#: By the block, or a row for each.
Vectors = Tensor | Mapping[int | str, Tensor]


def check_concepts(names: Sequence[object]) -> None:
    """Raise ProConError unless there are at most 8 different names, which can stand in logs, files and tables."""
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]{1,40}", name):
            raise ProConError(f"the name of a concept is {name!r:.80}: give 1 to 40 letters, digits, '_', '-' and '.'")
    if len(names) > MAX_DIRECTIONS:
        raise ProConError(f"{len(names)} concepts are too many: combine {MAX_DIRECTIONS} at most")
    name, count = Counter(names).most_common(1)[0]
    if count > 1:
        raise ProConError(f"two concepts are named {name!r}: give each a name of its own")


def rows_of(vectors: Vectors, blocks: int, width: int) -> Tensor:
    """``[blocks + 1, width]`` fp64, zeros where no vector is given.

    Raises:
        ProConError: for what does not fit a model of so many blocks and that width, is not finite, or is zero.
    """
    if isinstance(vectors, Tensor):
        given = dict(enumerate(vectors if vectors.dim() else ()))
        if len(given) not in (blocks, blocks + 1):
            raise ProConError(
                f"vectors has {len(given)} rows, but the model has {blocks} blocks: give one for each, or name the "
                "blocks"
            )
    else:
        given = {blocks if name == LAST else name: vector for name, vector in vectors.items()}
    rows = torch.zeros(blocks + 1, width, dtype=torch.float64)
    for site, vector in given.items():
        if isinstance(site, bool) or not isinstance(site, int) or not 0 <= site <= blocks:
            raise ProConError(
                f"vectors names block {site!r:.40}, but the model has {blocks}: give indices below {blocks}, or 'last' "
                "for the output of the last block"
            )
        where = f"block {site}" if site < blocks else "the last block's output"
        vector = torch.as_tensor(vector).detach().cpu()
        if vector.shape != (width,):
            raise ProConError(
                f"the vector of {where} has shape {tuple(vector.shape)}, but the model has hidden states of width "
                f"{width}: give vectors of that width"
            )
        rows[site] = vector.double()
        if not torch.isfinite(rows[site]).all():
            raise ProConError(f"the vector of {where} is NaN or infinite: give finite numbers")
        if not rows[site].any() and not isinstance(vectors, Tensor):
            raise ProConError(f"the vector of {where} is zero: leave the block out")
    if not rows.any():
        raise ProConError("no vectors are given, or zeros alone: give a vector for at least one block")
    return rows


def load_vectors(path: str | Path) -> Vectors:
    """Vectors from a safetensors file, as :meth:`Directions.from_vectors` takes them.

    The file has one tensor ``vectors``, ``[L, D]``; or one of ``[D]`` for each block, named by its index, such as
    ``14``, or ``last``.

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
    if tensors.keys() == {"vectors"}:
        return tensors["vectors"]
    for name in tensors:
        if name != LAST and not re.fullmatch("[0-9]{1,9}", name):
            raise ProConError(
                f"vectors file {str(path)!r} has {name!r:.60}: name one tensor 'vectors', or each by its block, such "
                "as '14' or 'last'"
            )
    return {name if name == LAST else int(name): tensor for name, tensor in tensors.items()}
