"""Anchors: the projections of every training token at the start, recorded once and looked up by content.

They take ``L`` floats a constrained token, so no reference model stays in memory and no step runs a second forward.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from procon.decoder import evaluating, find_decoder, model_device, observe_block_inputs, weights_hash
from procon.directions import RefusalDirections
from procon.errors import ProConError
from procon.functional import project
from procon.sequences import REDUCTIONS, TOKEN_SCOPES, Reduction, TokenScope, split_batch
from procon.sequences import Sequence as TokenSequence

_MANIFEST = "anchors.json"
_SHARD_BYTES = 64 * 2**20

#: What a collator may hand to a decoder; anything else (images, say) would be lost on the way to the anchors.
_DECODER_INPUTS = {
    "input_ids",
    "attention_mask",
    "position_ids",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "max_length_q",
    "max_length_k",
    "seq_idx",
}
_NOT_DECODER_INPUTS = {"labels", "shift_labels", "num_items_in_batch"}


class Anchors:
    """An opened store of initial projections ``z0`` (paper section III-C1).

    The folder holds safetensors shards (fp32, memory-mapped, read lazily) and a manifest. Sequences are found by a
    hash of their own unpadded token ids and label mask, so shuffling, batching, padding and packing may all change.

    Args:
        path: a folder that :meth:`record` completed.

    Raises:
        ProConError: if it is missing, incomplete or damaged.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            manifest = json.loads((self.path / _MANIFEST).read_text())
        except FileNotFoundError as error:
            raise ProConError(
                f"no anchors in {str(path)!r}: record them with Anchors.record before training"
            ) from error
        except json.JSONDecodeError as error:
            raise ProConError(
                f"anchors manifest in {str(path)!r} is damaged: delete the folder to record again"
            ) from error
        self.fingerprint: str = manifest["fingerprint"]
        self.blocks: tuple[int, ...] = tuple(manifest["blocks"])
        self.scope: TokenScope = manifest["scope"]
        self._open()

    def _open(self) -> None:
        self._shards = [_Shard(path) for path in sorted(self.path.glob("*.safetensors"))]
        keys = [shard.keys for shard in self._shards] or [np.empty((0, 2), np.uint64)]
        flat = np.concatenate(keys)
        self._order = np.argsort(flat[:, 0], kind="stable")
        self._keys = flat[self._order]
        sizes = np.array([len(k) for k in keys])
        self._first = np.concatenate([[0], np.cumsum(sizes)])

    def __getstate__(self) -> dict:
        return {"path": self.path, "fingerprint": self.fingerprint, "blocks": self.blocks, "scope": self.scope}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self._keys)

    def __contains__(self, sequence: TokenSequence) -> bool:
        return self._find(sequence.key()) is not None

    def _find(self, key: tuple[int, int]) -> int | None:
        """Position of a key over all shards."""
        at = int(np.searchsorted(self._keys[:, 0], np.uint64(key[0])))
        while at < len(self._keys) and int(self._keys[at, 0]) == key[0]:
            if int(self._keys[at, 1]) == key[1]:
                return int(self._order[at])
            at += 1
        return None

    def lookup(self, sequence: TokenSequence) -> np.ndarray:
        """Projections of the constrained tokens of one sequence: ``[tokens in scope, blocks]`` fp32.

        Raises:
            ProConError: if the sequence was not recorded, or was recorded with other labels.
        """
        key = sequence.key()
        position = self._find(key)
        if position is None:
            at = int(np.searchsorted(self._keys[:, 0], np.uint64(key[0])))
            relabelled = at < len(self._keys) and int(self._keys[at, 0]) == key[0]
            raise _Missing(relabelled)
        shard = int(np.searchsorted(self._first, position, side="right")) - 1
        return self._shards[shard].rows(position - int(self._first[shard]))

    def annotate(
        self,
        batch: dict[str, Any],
        describe: Callable[[Sequence[int]], str] | None = None,
        *,
        reduction: Reduction = "token",
    ) -> dict[str, Any]:
        """Add ``anchors`` ``[B, T, blocks]`` fp32 and ``constraint_mask`` ``[B, T]`` fp32, above 0 on tokens in scope.

        Args:
            describe: makes a text of token ids, for errors.
            reduction: ``"token"``: the mask is 1 on each of them, and counts tokens. ``"sequence"``: it adds up to 1
                over each sequence, and counts sequences.

        Raises:
            ProConError: for a sequence that is not in the store, naming it.
        """
        if reduction not in REDUCTIONS:
            raise ProConError(f"reduction is {reduction!r}: choose one of {', '.join(REDUCTIONS)}")
        shape = batch["input_ids"].shape
        anchors = torch.zeros(*shape, len(self.blocks))
        mask = torch.zeros(shape)
        for sequence in split_batch(batch):
            scope = sequence.in_scope(self.scope)
            try:
                rows = self.lookup(sequence)
            except _Missing as miss:
                start = sequence.input_ids[:24].tolist()
                text = describe(start) if describe else str(start)
                what = "was recorded with other labels" if miss.relabelled else "has no anchors"
                raise ProConError(
                    f"sample of {len(sequence.input_ids)} tokens starting {text!r} {what} in {str(self.path)!r}: "
                    "train on the data that anchors were recorded for, or record again from the starting model"
                ) from None
            where = torch.from_numpy(scope)
            anchors[sequence.row, sequence.span][where] = torch.from_numpy(rows)
            share = 1.0 / max(1, scope.sum()) if reduction == "sequence" else 1.0
            mask[sequence.row, sequence.span] = where.float() * share
        return {**batch, "anchors": anchors, "constraint_mask": mask}

    @classmethod
    def record(
        cls,
        model: nn.Module,
        dataloader: Iterable[Mapping[str, Tensor]],
        directions: RefusalDirections,
        path: str | Path,
        *,
        blocks: Sequence[int] | None = None,
        scope: TokenScope = "response",
        rank: int = 0,
        barrier: Callable[[], None] = lambda: None,
        progress: bool = True,
    ) -> Anchors:
        """Record the projections of all sequences of ``dataloader`` under ``model`` as it now is.

        Runs the base decoder only (no LM head), in eval mode without gradients. Sequences already in the folder are
        skipped, so an interrupted recording goes on where it stopped, and a grown data set records only what is new.

        Args:
            dataloader: batches with ``input_ids``, ``labels`` and what the decoder needs besides; under several
                ranks, each rank passes its own share.
            blocks: indices of the blocks to record; all that have a direction if not given.
            rank, barrier: this process, and a function that waits for all of them.

        Raises:
            ProConError: if the folder belongs to another model, directions, blocks or scope; on projections that are
                not finite; or on inputs that a text decoder does not take.
        """
        if scope not in TOKEN_SCOPES:
            raise ProConError(f"scope is {scope!r}: choose one of {', '.join(TOKEN_SCOPES)}")
        decoder = find_decoder(model)
        directions.check_fits(decoder)
        if blocks is None:
            blocks = directions.usable.nonzero().flatten().tolist()
        path = Path(path)
        manifest = {
            "fingerprint": fingerprint(model, directions, blocks, scope),
            "blocks": list(blocks),
            "scope": scope,
        }
        _claim(path, manifest, rank, barrier)
        known = cls(path)
        barrier()
        writer = _ShardWriter(path, rank)
        unit = directions.directions.to(model_device(model))
        seen: set[tuple[int, int]] = set()
        total = len(dataloader) if hasattr(dataloader, "__len__") else None
        with evaluating(model):
            for batch in tqdm(dataloader, total=total, desc="anchors", unit="batch", disable=not progress or rank != 0):
                new = []
                for sequence in split_batch(batch):
                    key = sequence.key()
                    if key not in seen and sequence not in known:
                        seen.add(key)
                        new.append(sequence)
                if new:
                    z = _project_batch(model, decoder, batch, unit, blocks)
                    for sequence in new:
                        scoped = z[sequence.row, sequence.span][torch.from_numpy(sequence.in_scope(scope))]
                        _check_finite(scoped, blocks, sequence)
                        writer.add(sequence.key(), scoped.numpy())
        writer.flush()
        barrier()
        return cls(path)


class AnchoredCollator:
    """A data collator that adds anchors to what another one makes; runs in the loader's workers.

    Args:
        collator: any collator that gives ``input_ids`` and ``labels``.
        anchors: an opened store. None until there is one: batches then pass as they are.
        reduction: of :meth:`Anchors.annotate`.
        tokenizer: names samples in errors; the collator's own if not given.
    """

    def __init__(
        self,
        collator: Callable[[list], dict[str, Any]],
        anchors: Anchors | None,
        *,
        reduction: Reduction = "token",
        tokenizer: Any = None,
    ):
        self.collator = collator
        self.anchors = anchors
        self.reduction = reduction
        self.tokenizer = tokenizer

    def __call__(self, features: list) -> dict[str, Any]:
        batch = dict(self.collator(features))
        if self.anchors is None:
            return batch
        decode = getattr(self.tokenizer or getattr(self.collator, "tokenizer", None), "decode", None)
        return self.anchors.annotate(batch, decode, reduction=self.reduction)


def fingerprint(model: nn.Module, directions: RefusalDirections, blocks: Sequence[int], scope: TokenScope) -> str:
    """A short hash of all that anchors depend on, the data aside: weights and dtype, directions, blocks, scope."""
    parts = [weights_hash(model), str(model.get_input_embeddings().weight.dtype), directions.hash, list(blocks), scope]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


class _Missing(KeyError):
    def __init__(self, relabelled: bool):
        super().__init__()
        self.relabelled = relabelled


class _Shard:
    """One safetensors file: ``keys [S, 2]``, ``offsets [S + 1]``, ``projections [tokens, blocks]``."""

    def __init__(self, path: Path):
        try:
            self._file = safe_open(path, "numpy")
            self.keys: np.ndarray = self._file.get_tensor("keys")
            self._offsets: np.ndarray = self._file.get_tensor("offsets")
            self._projections = self._file.get_slice("projections")
        except SafetensorError as error:
            raise ProConError(f"anchor file {str(path)!r} is damaged ({error}): delete it to record again") from error

    def rows(self, index: int) -> np.ndarray:
        return self._projections[int(self._offsets[index]) : int(self._offsets[index + 1])]


class _ShardWriter:
    """Gathers sequences and writes them out in files of about 64 MiB, each complete or absent."""

    def __init__(self, path: Path, rank: int):
        self._path = path
        self._rank = rank
        self._number = len(list(path.glob(f"rank{rank:05d}-*.safetensors")))
        self._keys: list[tuple[int, int]] = []
        self._rows: list[np.ndarray] = []
        self._bytes = 0

    def add(self, key: tuple[int, int], rows: np.ndarray) -> None:
        self._keys.append(key)
        self._rows.append(rows)
        self._bytes += rows.nbytes
        if self._bytes >= _SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        if not self._keys:
            return
        tensors = {
            "keys": np.array(self._keys, np.uint64),
            "offsets": np.cumsum([0, *(len(rows) for rows in self._rows)]).astype(np.int64),
            "projections": np.concatenate(self._rows).astype(np.float32),
        }
        target = self._path / f"rank{self._rank:05d}-{self._number:05d}.safetensors"
        partial = target.with_suffix(".partial")
        save_file(tensors, partial)
        partial.replace(target)
        self._number += 1
        self._keys, self._rows, self._bytes = [], [], 0


def _claim(path: Path, manifest: dict, rank: int, barrier: Callable[[], None]) -> None:
    """Write the manifest, or check that the folder's own says the same."""
    file = path / _MANIFEST
    if rank == 0 and not file.exists():
        path.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps(manifest, indent=2))
        partial.replace(file)
    barrier()
    found = json.loads(file.read_text())
    if found != manifest:
        raise ProConError(
            f"anchors in {str(path)!r} were recorded for another model state, directions, blocks or scope: give "
            "another folder, or delete this one to record again"
        )


def _project_batch(model, decoder, batch: Mapping[str, Tensor], unit: Tensor, blocks: Sequence[int]) -> Tensor:
    """Projections ``[B, T, blocks]`` fp32 on the CPU."""
    foreign = set(batch) - _DECODER_INPUTS - _NOT_DECODER_INPUTS
    if foreign:
        raise ProConError(
            f"the batch has {sorted(foreign)}, which a text decoder does not take: anchors cannot be recorded for it"
        )
    device = model_device(model)
    inputs = {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in batch.items()
        if name in _DECODER_INPUTS
    }
    place = {block: column for column, block in enumerate(blocks)}
    z = torch.empty(*batch["input_ids"].shape, len(blocks))

    def observe(block: int, hidden: Tensor) -> None:
        if block in place:
            z[..., place[block]] = project(hidden, unit[block].to(hidden.device)).to("cpu", torch.float32)

    with observe_block_inputs(decoder, observe):
        decoder.module(**inputs, use_cache=False)
    return z


def _check_finite(z: Tensor, blocks: Sequence[int], sequence: TokenSequence) -> None:
    bad = ~torch.isfinite(z).all(0)
    if bad.any():
        raise ProConError(
            f"hidden states entering block {blocks[int(bad.nonzero()[0])]} are NaN or infinite on the sample of "
            f"{len(sequence.input_ids)} tokens starting {sequence.input_ids[:24].tolist()}: load the model in "
            "bfloat16 or float32, and check its weights"
        )
