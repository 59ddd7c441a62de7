"""The file that directions are kept in: safetensors, with their provenance and a checksum of it all in the header."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from procon.errors import ProConError
from procon.files import write_bytes

#: Tensors of refusal directions, and one that only files of several directions per block have.
TENSORS = ("directions", "gap", "auroc", "malicious", "benign")
FURTHER = "further"

#: Tensors of directions of named concepts.
CONCEPT_TENSORS = ("vectors", "scale", "auroc", "positive", "negative", "length", "bias", "threshold")

#: Bytes of a header, at most: a few tensors, and a provenance.
_LONGEST_HEADER = 1_000_000

#: In place of a checksum that a file of an older version has not.
_UNKNOWN = object()


def write(path: str | Path, tensors: dict[str, Tensor], provenance: dict[str, Any]) -> Path:
    """Write both to ``path``; returns it as a path."""
    # Copies, as safetensors refuses tensors that share memory.
    copies = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    text = json.dumps(provenance)
    return write_bytes(_in_order(save(copies, {"procon": text, "checksum": _checksum(copies, text)})), path)


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors, fp32 in memory of their own, and provenance; what the tensors hold is not checked.

    Raises:
        ProConError: if the file does not exist, or is not what :func:`write` wrote.
    """
    if not os.path.isfile(path):
        raise ProConError(f"directions file {str(path)!r} does not exist: make it with 'procon directions'")
    try:
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > min(path.stat().st_size, _LONGEST_HEADER):
                raise ValueError("its header is no header")
            header = json.loads(stream.read(length))
            metadata = header.pop("__metadata__", {})
            names = header.keys()
            ours = {*TENSORS} <= names <= {*TENSORS, FURTHER} or names == {*CONCEPT_TENSORS}
            if not ours:  # a model's, for example, which is not read
                raise ValueError(f"it holds {', '.join(sorted(names))[:100]}")
            stream.seek(0)
            tensors = load(stream.read())
        text = metadata.get("procon", "{}")
        provenance = json.loads(text)
        if not isinstance(provenance, dict) or not all(tensor.is_floating_point() for tensor in tensors.values()):
            raise TypeError("it holds other values")
        if metadata.get("checksum", _UNKNOWN) not in (_UNKNOWN, _checksum(tensors, text)):
            raise ValueError("its checksum differs")
    # What safetensors and torch raise on such bytes.
    except (SafetensorError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, OSError) as error:
        raise ProConError(
            f"directions file {str(path)!r} is damaged or not one of ProCon's ({error}): extract it again"
        ) from error
    if "checksum" not in metadata:
        warnings.warn(
            f"directions file {str(path)!r} has no checksum, so damage would go unnoticed: load it and save it again",
            stacklevel=3,
        )
    return {name: tensor.float() for name, tensor in tensors.items()}, provenance


def _in_order(data: bytes) -> bytes:
    """Equal directions make equal files: safetensors puts the metadata in an order that chance gives."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[end:]


def _checksum(tensors: dict[str, Tensor], provenance: str) -> str:
    digest = hashlib.blake2b(provenance.encode(), digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
