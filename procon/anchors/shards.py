"""The files that anchors are kept in: safetensors of about 64 MiB, each with the projections of many sequences.

They know when they are damaged, or belong to other anchors. A file's name and metadata have the fingerprint that the
anchors were recorded under. Each sequence has a checksum of its projections, seeded with its keys and that
fingerprint; it is verified whenever the sequence is read. The index has one too. Checksums find damage, not forgery.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors.numpy import save
from xxhash import xxh3_64_intdigest

from procon.errors import ProConError
from procon.files import write_bytes

#: Bytes of projections that make a file.
SHARD_BYTES = 64 * 2**20

#: Content hashes of a sequence's token ids and of its label mask.
Key = tuple[int, int]

_ENTRY = np.dtype(
    [("tokens", "u8"), ("labels", "u8"), ("start", "i8"), ("checksum", "u8"), ("length", "i4"), ("file", "i4")]
)

#: Tensors of a file, with their dtypes in safetensors' and in numpy's words, and their dimensions.
_TENSORS = {
    "keys": ("U64", "<u8", 2),
    "offsets": ("I64", "<i8", 1),
    "checksums": ("U64", "<u8", 1),
    "projections": ("F32", "<f4", 2),
}

#: Bytes of a file's header, at most. It has four tensors and two short texts.
_LONGEST_HEADER = 100_000


#: Keeps the two keys of a sequence apart where they are mixed: 2**64 divided by the golden ratio.
_ODD = 0x9E3779B97F4A7C15


class DamagedShard(Exception):
    """Says what is wrong with a file of anchors."""


class AnchorShards:
    """The shards of a folder, opened for reading.

    A shard has the tensors ``keys [S, 2]`` uint64, ``offsets [S + 1]`` int64, ``checksums [S]`` uint64 and
    ``projections [tokens, columns]`` fp32; the rows of sequence ``s`` are ``offsets[s]`` to ``offsets[s + 1]``.

    Only an index of 48 bytes per sequence stays in memory. Projections are read from their place in the file, not
    mapped: the pages of a mapping count as the process's own once they are touched, and an epoch touches all. No file
    stays open, so a loader's workers may be forked or spawned.

    Args:
        folder: where they are. Files of other anchors in it are left alone.
        fingerprint: of the state that they were recorded in.
        columns: values per token.

    Raises:
        ProConError: if the index of a file is damaged, or of other anchors.
    """

    def __init__(self, folder: Path, fingerprint: str, columns: int) -> None:
        self._files = shard_files(folder, fingerprint)
        self._columns = columns
        self._seed = int(fingerprint, 16)
        # No name is kept for what has been copied: at ten million sequences, a copy is 400 MB.
        entries = np.concatenate([np.empty(0, _ENTRY), *self._read_entries(fingerprint)])
        entries = entries[np.lexsort((entries["labels"], entries["tokens"]))]
        keys = entries[["tokens", "labels"]]
        repeated = np.zeros(len(keys), bool)
        repeated[1:] = keys[1:] == keys[:-1]
        self._entries = entries[~repeated] if repeated.any() else entries
        # Contiguous, as a search in a strided column would copy it every time.
        self._tokens = np.ascontiguousarray(self._entries["tokens"])

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self._entries)

    def __contains__(self, key: Key) -> bool:
        return bool((self._same_tokens(key)["labels"] == key[1]).any())

    def has_tokens(self, key: Key) -> bool:
        """Whether the sequence is there, possibly with other labels."""
        return len(self._same_tokens(key)) > 0

    def read(self, key: Key) -> np.ndarray | None:
        """Projections ``[tokens, columns]`` fp32 of a sequence, from the disk; None if it is not there.

        Raises:
            ProConError: if they are not those that were recorded.
        """
        for entry in self._same_tokens(key):
            _, labels, start, checksum, length, number = entry.item()
            if labels == key[1]:
                file = self._files[number]
                try:
                    rows = np.fromfile(file, "<f4", length * self._columns, offset=start)
                except OSError as error:
                    raise _damaged(file, error.strerror) from error
                if len(rows) < length * self._columns:
                    raise _damaged(file, "it is cut off")
                if _checksum(rows, key, self._seed) != checksum:
                    raise _damaged(file, "a sequence's checksum differs")
                return rows.reshape(length, self._columns)
        return None

    def _read_entries(self, fingerprint: str) -> Iterator[np.ndarray]:
        """The sequences of each file, as it has them."""
        for number, file in enumerate(self._files):
            try:
                index = read_index(file, fingerprint, self._columns)
            except DamagedShard as error:
                raise _damaged(file, error) from error
            entries = np.empty(len(index.keys), _ENTRY)
            entries["tokens"], entries["labels"] = index.keys.T
            entries["start"] = index.start + index.offsets[:-1] * self._columns * 4
            entries["checksum"] = index.checksums
            entries["length"] = np.diff(index.offsets)
            entries["file"] = number
            yield entries

    def _same_tokens(self, key: Key) -> np.ndarray:
        first = np.searchsorted(self._tokens, np.uint64(key[0]))
        last = np.searchsorted(self._tokens, np.uint64(key[0]), "right")
        return self._entries[first:last]


class ShardWriter:
    """Gathers sequences and writes them out as shards, each complete or absent.

    A shard is named by a hash of its keys: what several ranks, or runs that were interrupted, write never collides.

    Args:
        folder: where to write; several processes may write to one at a time.
        fingerprint: of the state that the sequences were recorded in.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self._folder = folder
        self._fingerprint = fingerprint
        self._keys: list[Key] = []
        self._rows: list[np.ndarray] = []
        self._bytes = 0

    def add(self, key: Key, rows: np.ndarray) -> None:
        """Add the projections ``[tokens, columns]`` fp32 of a sequence."""
        self._keys.append(key)
        self._rows.append(np.ascontiguousarray(rows, "<f4"))
        self._bytes += rows.nbytes
        if self._bytes >= SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write out what has been added since the last shard."""
        if not self._keys:
            return
        seed = int(self._fingerprint, 16)
        checksums = [_checksum(rows, key, seed) for key, rows in zip(self._keys, self._rows, strict=True)]
        index = Index(
            keys=np.array(self._keys, "<u8"),
            offsets=np.cumsum([0, *map(len, self._rows)], dtype="<i8"),
            checksums=np.array(checksums, "<u8"),
        )
        tensors = {**index.tensors, "projections": np.concatenate(self._rows)}
        columns = tensors["projections"].shape[1]
        metadata = {"fingerprint": self._fingerprint, "index": index.checksum(self._fingerprint, columns)}
        name = hashlib.blake2b(index.keys.tobytes(), digest_size=8).hexdigest()
        write_bytes(save(tensors, metadata), self._folder / f"{self._fingerprint}-{name}.safetensors")
        self._keys, self._rows, self._bytes = [], [], 0


class Index(NamedTuple):
    """Where the sequences of a file are, and what they must be; ``start`` is the byte where projections begin."""

    keys: np.ndarray
    offsets: np.ndarray
    checksums: np.ndarray
    start: int = 0

    @property
    def tensors(self) -> dict[str, np.ndarray]:
        return {"keys": self.keys, "offsets": self.offsets, "checksums": self.checksums}

    def checksum(self, fingerprint: str, columns: int) -> str:
        """Of all of it, and of what it is the index of."""
        digest = hashlib.blake2b(f"{fingerprint} {columns}".encode(), digest_size=8)
        for tensor in self.tensors.values():
            digest.update(tensor.tobytes())
        return digest.hexdigest()

    def is_whole(self, sequence: int, rows: np.ndarray, fingerprint: str) -> bool:
        """Whether ``rows`` are what was recorded for the sequence."""
        key = tuple(self.keys[sequence].tolist())
        return _checksum(rows, key, int(fingerprint, 16)) == self.checksums[sequence]


def shard_files(folder: Path, fingerprint: str) -> list[Path]:
    """The files in ``folder`` that are of the anchors with that fingerprint, by name."""
    return sorted(folder.glob(f"{fingerprint}-*.safetensors"))


def read_index(file: Path, fingerprint: str, columns: int) -> Index:
    """The index of a file, as it was written.

    Raises:
        DamagedShard: if the file is not a whole one of these anchors.
    """
    try:
        with file.open("rb") as stream:
            size = file.stat().st_size
            length = int.from_bytes(stream.read(8), "little")
            if length > min(size, _LONGEST_HEADER):
                raise DamagedShard("its header is no header")
            header = json.loads(stream.read(length))
            found = header["__metadata__"]["fingerprint"]
            if found != fingerprint:
                raise DamagedShard(f"its fingerprint is {found!r:.40}, so it is of other anchors")
            tensors, starts, sizes = {}, {}, []
            for name, (word, dtype, dimensions) in _TENSORS.items():
                shape, (start, stop) = header[name]["shape"], header[name]["data_offsets"]
                whole = header[name]["dtype"] == word and len(shape) == dimensions
                whole = whole and all(type(number) is int and number >= 0 for number in (*shape, start, stop))
                if not whole or math.prod(shape) * np.dtype(dtype).itemsize != stop - start:
                    raise DamagedShard(f"its header is wrong about {name}")
                starts[name] = 8 + length + start
                sizes.append(stop - start)
                if starts[name] + stop - start > size:
                    raise DamagedShard("it is cut off")
                if name != "projections":
                    stream.seek(starts[name])
                    tensors[name] = np.frombuffer(stream.read(stop - start), dtype).reshape(shape)
        index = Index(**tensors, start=starts["projections"])
        tokens, found_columns = header["projections"]["shape"]
        fits = index.keys.shape == (len(index.checksums), 2) and len(index.offsets) == len(index.keys) + 1 > 1
        fits = fits and index.offsets[0] == 0 and (np.diff(index.offsets) >= 0).all() and index.offsets[-1] == tokens
        if not fits or found_columns != columns or size != 8 + length + sum(sizes):
            raise DamagedShard("its parts do not fit together")
        if header["__metadata__"]["index"] != index.checksum(fingerprint, columns):
            raise DamagedShard("the checksum of its index differs")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OSError) as error:
        raise DamagedShard(f"no {error}" if isinstance(error, KeyError) else str(error)) from error
    return index


def _checksum(rows: np.ndarray, key: Key, seed: int) -> int:
    """Of a sequence's projections, as those of this sequence under this fingerprint; ``rows`` are contiguous."""
    seed = (key[0] + key[1] * _ODD ^ seed) % 2**64
    # To a type checker, numpy's arrays are buffers only from Python 3.12 on.
    return xxh3_64_intdigest(rows, seed)  # pyright: ignore[reportArgumentType]


def _damaged(file: Path, reason: object) -> ProConError:
    return ProConError(
        f"anchor file {str(file)!r} is damaged ({reason}): record again from the starting model, which keeps what is "
        "whole"
    )
