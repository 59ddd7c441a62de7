"""Verify all anchors of a folder before more are recorded, and take out what is damaged: it is then recorded again."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np

from procon.anchors.exchange import once_per_host, own_rank
from procon.anchors.manifest import Manifest
from procon.anchors.shards import DamagedShard, Index, ShardWriter, read_index, shard_files
from procon.files import clean, writing


def mend(folder: Path, manifest: Manifest) -> None:
    """Leave only whole sequences in ``folder``, and warn of how much was not; all ranks must call.

    Of a damaged file, sequences that are whole are written to another; if its index is damaged, they cannot be
    separated, and all are lost. Files of other anchors are left alone; a warning names one.
    """
    found = once_per_host(folder, lambda: _mend(folder, manifest))
    if own_rank() != 0:
        return
    sequences, files = sum(host[0] for host in found), sum(host[1] for host in found)
    foreign = next((name for _, _, name in found if name), "")
    if sequences or files:
        warnings.warn(
            f"anchors in {str(folder)!r} were damaged: {sequences} sequences, and all those of {files} files, are "
            "recorded again",
            stacklevel=3,
        )
    if foreign:
        warnings.warn(
            f"{foreign!r} in {str(folder)!r} is not one of the anchors recorded here (fingerprint "
            f"{manifest.fingerprint}): it is left alone, and not used",
            stacklevel=3,
        )


def _mend(folder: Path, manifest: Manifest) -> tuple[int, int, str]:
    """Damaged sequences in files whose index is whole, files with a damaged one, a file of other anchors."""
    clean(folder)
    sequences = files = 0
    for file in shard_files(folder, manifest.fingerprint):
        with writing(file):
            try:
                index = read_index(file, manifest.fingerprint, manifest.columns)
            except DamagedShard:
                files += 1
            else:
                damaged = _take_over_whole(folder, manifest, file, index)
                if not damaged:
                    continue
                sequences += damaged
            file.unlink(missing_ok=True)
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    foreign = [name for name in names if not name.startswith(f"{manifest.fingerprint}-")]
    return sequences, files, foreign[0] if foreign else ""


def _take_over_whole(folder: Path, manifest: Manifest, file: Path, index: Index) -> int:
    """Number of damaged sequences in ``file``; if there are any, the others are written to another."""
    shape = int(index.offsets[-1]), manifest.columns
    rows = np.fromfile(file, "<f4", shape[0] * shape[1], offset=index.start).reshape(shape)
    parts = np.split(rows, index.offsets[1:-1])
    whole = [index.is_whole(number, part, manifest.fingerprint) for number, part in enumerate(parts)]
    if not all(whole):
        writer = ShardWriter(folder, manifest.fingerprint)
        for key, part, is_whole in zip(index.keys.tolist(), parts, whole, strict=True):
            if is_whole:
                writer.add(tuple(key), part)
        writer.flush()
    return whole.count(False)
