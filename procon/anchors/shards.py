"""The files that anchors are kept in: safetensors of about 64 MiB, each with the projections of many sequences."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from procon.errors import ProConError
from procon.files import write_bytes

#: Bytes of projections that make a file.
SHARD_BYTES = 64 * 2**20

#: Content hashes of a sequence's token ids and of its label mask.
Key = tuple[int, int]

_ENTRY = np.dtype([("tokens", "u8"), ("labels", "u8"), ("start", "i8"), ("length", "i4"), ("file", "i4")])


class AnchorShards:
    """The shards of a folder, opened for reading.

    A shard has the tensors ``keys [S, 2]`` uint64, ``offsets [S + 1]`` int64 and ``projections [tokens, columns]``
    fp32; the rows of sequence ``s`` are ``offsets[s]`` to ``offsets[s + 1]``.

    Only an index of 40 bytes per sequence stays in memory. Projections are read from their place in the file, not
    mapped: the pages of a mapping count as the process's own once they are touched, and an epoch touches all. No file
    stays open, so a loader's workers may be forked or spawned.

    Raises:
        ProConError: if a file is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._files = sorted(folder.glob("*.safetensors"))
        self._columns = 0
        parts = [np.empty(0, _ENTRY)]
        for number, file in enumerate(self._files):
            keys, offsets, self._columns, start = _read_index(file)
            entries = np.empty(len(keys), _ENTRY)
            entries["tokens"], entries["labels"] = keys.T
            entries["start"] = start + offsets[:-1] * self._columns * 4
            entries["length"] = np.diff(offsets)
            entries["file"] = number
            parts.append(entries)
        entries = np.concatenate(parts)
        entries = entries[np.lexsort((entries["labels"], entries["tokens"]))]
        keys = entries[["tokens", "labels"]]
        repeated = np.zeros(len(keys), bool)
        repeated[1:] = keys[1:] == keys[:-1]
        self._entries = entries[~repeated]
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
        """Projections ``[tokens, columns]`` fp32 of a sequence, from the disk; None if it is not there."""
        for entry in self._same_tokens(key):
            if entry["labels"] == key[1]:
                shape = int(entry["length"]), self._columns
                file, start = self._files[entry["file"]], int(entry["start"])
                return np.fromfile(file, "<f4", shape[0] * shape[1], offset=start).reshape(shape)
        return None

    def _same_tokens(self, key: Key) -> np.ndarray:
        first = np.searchsorted(self._tokens, np.uint64(key[0]))
        last = np.searchsorted(self._tokens, np.uint64(key[0]), "right")
        return self._entries[first:last]


class ShardWriter:
    """Gathers sequences and writes them out as shards, each complete or absent.

    A shard is named by a hash of its keys: what several ranks, or runs that were interrupted, write never collides.

    Args:
        folder: where to write; several processes may write to one at a time.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._keys: list[Key] = []
        self._rows: list[np.ndarray] = []
        self._bytes = 0

    def add(self, key: Key, rows: np.ndarray) -> None:
        """Add the projections ``[tokens, columns]`` fp32 of a sequence."""
        self._keys.append(key)
        self._rows.append(rows)
        self._bytes += rows.nbytes
        if self._bytes >= SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write out what has been added since the last shard."""
        if not self._keys:
            return
        keys = np.array(self._keys, np.uint64)
        tensors = {
            "keys": keys,
            "offsets": np.cumsum([0, *(len(rows) for rows in self._rows)], dtype=np.int64),
            "projections": np.concatenate(self._rows, dtype=np.float32),
        }
        name = hashlib.blake2b(keys.tobytes(), digest_size=8).hexdigest()
        write_bytes(save(tensors), self._folder / f"{name}.safetensors")
        self._keys, self._rows, self._bytes = [], [], 0


def _read_index(file: Path) -> tuple[np.ndarray, np.ndarray, int, int]:
    """Keys, offsets, number of columns, and the byte of the file where projections start."""
    try:
        with safe_open(file, "numpy") as shard:
            keys, offsets = shard.get_tensor("keys"), shard.get_tensor("offsets")
            columns = shard.get_slice("projections").get_shape()[1]
    except SafetensorError as error:
        raise ProConError(f"anchor file {str(file)!r} is damaged ({error}): delete it to record again") from error
    with file.open("rb") as raw:
        length = int.from_bytes(raw.read(8), "little")
        header = json.loads(raw.read(length))
    return keys, offsets, columns, 8 + length + header["projections"]["data_offsets"][0]
