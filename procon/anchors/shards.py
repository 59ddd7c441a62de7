"""The files that anchors are kept in: safetensors, each with the projections of many sequences.

A file's name begins with the fingerprint that its anchors were recorded under. Each sequence has a checksum of its
projections, seeded with its key and that fingerprint; it is verified whenever the sequence is read. The index has one
too. Checksums find damage, not forgery.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from xxhash import xxh3_64_intdigest

from procon.errors import ProConError
from procon.files import write_bytes

_ENTRY = np.dtype([("start", "i8"), ("checksum", "u8"), ("length", "i4"), ("file", "i4")])


class AnchorShards:
    """The shards of a folder, opened for reading.

    A shard has the tensors ``index [S, 3]`` uint64 (key of a sequence, number of its rows, their checksum) and
    ``projections [rows, columns]`` fp32, the rows of one sequence after those of another.

    Only an index of 32 bytes per sequence stays in memory. Projections are read from their place in the file, not
    mapped: the pages of a mapping count as the process's own once they are touched, and an epoch touches all. No file
    stays open, so a loader's workers may be forked or spawned.

    Args:
        folder: where they are.
        fingerprint: of the state that they were recorded in; files of other anchors are left alone.
        columns: values per token.

    Raises:
        ProConError: if the index of a file is damaged.
    """

    def __init__(self, folder: Path, fingerprint: str, columns: int) -> None:
        self._files = shard_files(folder, fingerprint)
        self._columns = columns
        self._fingerprint = fingerprint
        read = (read_index(file, fingerprint, columns, number) for number, file in enumerate(self._files))
        nothing = np.empty(0, "<u8"), np.empty(0, _ENTRY)
        keys, entries = map(np.concatenate, zip(nothing, *read, strict=True))  # no name keeps the parts
        self._keys, chosen = np.unique(keys, return_index=True)
        self._entries = entries[chosen]

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self._keys)

    def __contains__(self, key: int) -> bool:
        return self._find(key) is not None

    def read(self, key: int) -> np.ndarray | None:
        """Projections ``[tokens, columns]`` fp32 of a sequence; None if it is not there, ProConError if damaged."""
        place = self._find(key)
        if place is None:
            return None
        start, checksum, length, number = self._entries[place].item()
        file = self._files[number]
        try:
            rows = np.fromfile(file, "<f4", length * self._columns, offset=start)
        except OSError as error:
            raise _damaged(file, error.strerror) from error
        if _checksum(rows, key, self._fingerprint) != checksum:
            raise _damaged(file, "a sequence's checksum differs")
        return rows.reshape(length, self._columns)

    def _find(self, key: int) -> int | None:
        place = int(np.searchsorted(self._keys, np.uint64(key)))
        return place if place < len(self._keys) and int(self._keys[place]) == key else None


def write_shard(folder: Path, fingerprint: str, sequences: Sequence[tuple[int, np.ndarray]]) -> None:
    """Write keys and projections ``[tokens, columns]`` of sequences as a shard, named by a hash of its keys."""
    rows = [np.ascontiguousarray(rows, "<f4") for _, rows in sequences]
    index = [
        (key, len(each), _checksum(each, key, fingerprint)) for (key, _), each in zip(sequences, rows, strict=True)
    ]
    tensors = {"index": np.array(index, "<u8"), "projections": np.concatenate(rows)}
    metadata = {"checksum": _index_checksum(tensors["index"], fingerprint, rows[0].shape[1])}
    name = hashlib.blake2b(tensors["index"][:, 0].tobytes(), digest_size=8).hexdigest()
    write_bytes(save(tensors, metadata), folder / f"{fingerprint}-{name}.safetensors")


def shard_files(folder: Path, fingerprint: str) -> list[Path]:
    """The files in ``folder`` that are of the anchors with that fingerprint, by name."""
    return sorted(folder.glob(f"{fingerprint}-*.safetensors"))


def read_index(file: Path, fingerprint: str, columns: int, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Keys of a shard's sequences, and where they are in what is file ``number`` of its folder.

    Raises:
        ProConError: if the file is damaged, or of other anchors.
    """
    try:
        with safe_open(file, "numpy") as opened:
            index, checksum = opened.get_tensor("index"), (opened.metadata() or {}).get("checksum")
            rows, found_columns = opened.get_slice("projections").get_shape()
        # safetensors puts tensors of wider types first, and lets no byte follow the last one.
        start = file.stat().st_size - rows * columns * 4
    except (OSError, SafetensorError, ValueError) as error:
        raise _damaged(file, error) from error
    if found_columns != columns or checksum != _index_checksum(index, fingerprint, columns):
        raise _damaged(file, "its index is not the one that was written, or is of other anchors")
    keys, lengths, checksums = index.T
    entries = np.empty(len(index), _ENTRY)
    entries["start"] = start + (lengths.cumsum() - lengths) * columns * 4
    entries["checksum"], entries["length"], entries["file"] = checksums, lengths, number
    return keys, entries


def _index_checksum(index: np.ndarray, fingerprint: str, columns: int) -> str:
    """Of an index, as that of these anchors."""
    of = f"{fingerprint} {columns} {index.shape} ".encode() + index.tobytes()
    return hashlib.blake2b(of, digest_size=8).hexdigest()


def _checksum(rows: np.ndarray, key: int, fingerprint: str) -> int:
    """Of a sequence's projections, as those of this sequence under this fingerprint; ``rows`` are contiguous."""
    # To a type checker, numpy's arrays are buffers only from Python 3.12 on.
    return xxh3_64_intdigest(rows, key ^ int(fingerprint, 16))  # pyright: ignore[reportArgumentType]


def _damaged(file: Path, reason: object) -> ProConError:
    return ProConError(
        f"anchor file {str(file)!r} is damaged ({reason}): delete its folder, and record again from the starting model"
    )
