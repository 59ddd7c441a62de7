"""Anchors: the projections of every training token at the start, recorded once and looked up by content."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from procon.anchors.recording import ONE_TOKEN, checked_blocks, record_projections
from procon.anchors.shards import AnchorShards, shard_files, write_shard
from procon.directions import Directions
from procon.errors import ProConError
from procon.files import json_checksum, load_json, save_json
from procon.models import (
    DecoderForward,
    configuration_hash,
    evaluating,
    observe_block_inputs,
    token_embedding,
    unwrapped,
    weights_hash,
)
from procon.ranks import gather, is_main, on_all_ranks, share_files
from procon.sequences import TokenSequence, check_text_only, decoder_inputs, split_batch
from procon.settings import CHOICES, DEFAULTS, TokenScope, check_choice

#: The file of a folder that says what its anchors are of.
MANIFEST = "anchors.json"

#: Bytes of projections that make a file.
SHARD_BYTES = 64 * 2**20


class Anchors:
    """An opened store of initial projections ``z0`` (paper section III-C1).

    A float for each constrained token, block and direction: no reference model stays in memory, and no step runs a
    second forward. The folder holds safetensors shards and a manifest. Sequences are found by a hash of their own
    unpadded token ids and label mask, so shuffling, batching, padding and packing may all change.

    Args:
        path: a folder that :meth:`record` completed.

    Raises:
        ProConError: if it is missing or damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not (self.path / MANIFEST).exists():
            raise ProConError(f"no anchors in {str(path)!r}: record them with Anchors.record before training")
        self.manifest = load_json(self.path / MANIFEST, _checked, "anchors manifest")
        self.fingerprint: str = self.manifest["fingerprint"]
        self.blocks = tuple(self.manifest["blocks"])
        self.scope: TokenScope = self.manifest["scope"]
        self.k: int = self.manifest["k"]
        self._shards = AnchorShards(self.path, self.fingerprint, len(self.blocks) * self.k)

    @classmethod
    def reopen(cls, path: str | Path, fingerprint: str) -> Anchors:
        """The store with that fingerprint that any host of the process group has in ``path``; all ranks must call.

        Hosts that lack it, as one that took another's place in a resumed run does, get a copy.

        Raises:
            ProConError: on all ranks, if no host has it, or it is damaged.
        """
        share_files(Path(path))
        found = on_all_ranks(lambda: cls(path))
        if found.fingerprint != fingerprint:
            raise ProConError(
                f"anchors in {str(path)!r} have the fingerprint {found.fingerprint}, not {fingerprint}: put those of "
                "the interrupted run back, or start afresh"
            )
        return found

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self._shards)

    def annotate(self, batch: dict[str, Any], describe: Callable[[Sequence[int]], str] | None = None) -> dict[str, Any]:
        """Add ``anchors`` ``[B, T, blocks * K]``, block by block, and ``constraint_mask`` ``[B, T]``, both fp32.

        Args:
            batch: on the CPU, padded, packed or flattened (see :func:`procon.sequences.split_batch`).
            describe: makes a text of token ids, for errors.

        Raises:
            ProConError: for a sequence that was not recorded or is damaged, and a batch that is not of text alone.
        """
        mask, sequences = mask_tokens(batch, self.scope)
        anchors = torch.zeros(*mask.shape, len(self.blocks) * self.k)
        for sequence, chosen in sequences:
            rows = self._shards.read(sequence.key())
            if rows is None:
                ids = sequence.input_ids.tolist()
                start = describe(ids[:24]) if describe else str(ids[:24])
                raise ProConError(
                    f"sample of {len(ids)} tokens starting {start!r} has no anchors with these labels in "
                    f"{str(self.path)!r}: train on the data that was recorded, or record again from the starting model"
                )
            anchors[sequence.row, sequence.span][chosen] = torch.from_numpy(rows)
        return {**batch, "anchors": anchors, "constraint_mask": mask}

    @classmethod
    def record(
        cls,
        model: nn.Module,
        dataloader: Iterable[Mapping[str, Tensor]],
        directions: Directions,
        path: str | Path,
        *,
        blocks: Sequence[int] | None = None,
        scope: TokenScope = DEFAULTS.scope,
        progress: bool = True,
        state: str | None = None,
    ) -> Anchors:
        """Record the projections of all sequences of ``dataloader`` under ``model`` as it now is.

        Sequences already in the folder are skipped, so an interrupted recording goes on where it stopped, and a grown
        data set records only what is new. If a file of the folder is damaged, all are recorded again, with a warning.

        Under ``torch.distributed`` all ranks must call. Afterwards each finds the sequences of all in its own ``path``,
        on a file system that they share or not: ranks then send each other the files that they lack.

        Args:
            model: a transformers causal LM, also within PEFT, DDP, FSDP2 or DeepSpeed.
            dataloader: batches with ``input_ids``, ``labels`` and what else the decoder needs. Under several ranks,
                each passes its own share, of any length; ranks that compute one batch together pass the same.
            path: a folder.
            blocks: indices of the blocks to record; all that have a direction if not given.
            scope: which tokens of a sequence; a constraint acts on those that were recorded.
            state: the :func:`fingerprint`, if it is known: it takes a pass over all weights.

        Raises:
            ProConError: if the directions are of another model, or the folder belongs to another model state or
                precision, directions, blocks or scope; on projections that are not finite; or on inputs that a text
                decoder does not take.
        """
        check_choice("scope", scope, CHOICES["scope"])
        model = unwrapped(model)
        blocks = checked_blocks(model, directions, blocks)
        path = Path(path)
        state = state or fingerprint(model, directions, blocks, scope)
        manifest = {"fingerprint": state, "blocks": list(blocks), "scope": scope, "k": directions.k}
        if any(other != manifest for other in gather(manifest)):
            raise ProConError("the ranks' models, or what is to be recorded of them, differ: load the same on each")
        on_all_ranks(lambda: _claim(path, manifest))
        share_files(path)  # of a recording that was interrupted
        known = cls(path)._shards
        quiet = not (progress and is_main())
        batches = tqdm(dataloader, desc="anchors", unit="batch", disable=quiet)
        with evaluating(model):
            pending: list[tuple[int, np.ndarray]] = []
            size = 0
            for key, rows in record_projections(model, batches, directions.basis, blocks, scope, known):
                pending.append((key, rows))
                size += rows.nbytes
                if size >= SHARD_BYTES:
                    write_shard(path, state, pending)
                    pending, size = [], 0
            if pending:
                write_shard(path, state, pending)
        share_files(path)
        return cls(path)


class AnchoredCollator:
    """A data collator that adds anchors to what another one makes; runs in the loader's workers.

    Args:
        collator: any collator that gives ``input_ids`` and ``labels``.
        anchors: an opened store; or a scope, to add the ``constraint_mask`` of its tokens alone, for live anchors. None
            until there is one: batches then pass as they are.
        tokenizer: names samples in errors; the collator's own if not given.

    Raises:
        ProConError: when it is called, as of :meth:`Anchors.annotate`.
    """

    def __init__(
        self,
        collator: Callable[[list[Any]], dict[str, Any]],
        anchors: Anchors | TokenScope | None,
        *,
        tokenizer: Any = None,
    ) -> None:
        self.collator = collator
        self.anchors: Anchors | TokenScope | None = anchors
        self.tokenizer = tokenizer

    def __call__(self, features: list[Any]) -> dict[str, Any]:
        batch = dict(self.collator(features))
        if self.anchors is None:
            return batch
        if not isinstance(self.anchors, Anchors):
            return {**batch, "constraint_mask": mask_tokens(batch, self.anchors)[0]}
        decode = getattr(self.tokenizer or getattr(self.collator, "tokenizer", None), "decode", None)
        return self.anchors.annotate(batch, decode)


def fingerprint(model: nn.Module, directions: Directions, blocks: Sequence[int], scope: TokenScope) -> str:
    """A short hash of all that anchors depend on, the data aside; of a sharded model, all ranks must call.

    That is weights and dtype, the precision in which they run, configuration, directions, blocks and scope.
    """
    state = weights_hash(model), configuration_hash(model), running_precision(model)
    parts = [*state, directions.hash, list(map(int, blocks)), scope]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def running_precision(model: nn.Module) -> list[str]:
    """The dtypes of the weights, of the hidden states of a forward of one token, and of autocast if it is on.

    At the last block: autocast around the call and within the model, and what FSDP2 casts to, show alike.
    """
    forward = DecoderForward(model)
    found = [token_embedding(model).weight.dtype]

    def observe(block: int, hidden: Tensor) -> None:
        if block == len(forward.decoder.blocks) - 1:
            found.append(hidden.dtype)
            if torch.is_autocast_enabled(hidden.device.type):
                found.append(torch.get_autocast_dtype(hidden.device.type))

    with evaluating(model), observe_block_inputs(forward.decoder, observe):
        forward.run(**decoder_inputs(ONE_TOKEN, forward.device))
    return list(map(str, found))


def mask_tokens(batch: Mapping[str, Any], scope: TokenScope) -> tuple[Tensor, list[tuple[TokenSequence, Tensor]]]:
    """The mask of a batch, ``[B, T]`` fp32; and its sequences that have constrained tokens, with those, ``[t]`` bool.

    Raises:
        ProConError: for a batch that is not of text alone.
    """
    check_text_only(batch)
    mask = torch.zeros(batch["input_ids"].shape)
    sequences = []
    for sequence in split_batch(batch):
        chosen = torch.from_numpy(sequence.in_scope(scope))
        if chosen.any():
            mask[sequence.row, sequence.span][chosen] = 1.0
            sequences.append((sequence, chosen))
    return mask, sequences


def _checked(manifest: dict[str, Any]) -> dict[str, Any]:
    if manifest.pop("checksum") != json_checksum(manifest):
        raise ValueError("its checksum differs")
    return manifest


def _claim(path: Path, manifest: dict[str, Any]) -> None:
    """Make the folder one of these anchors, unless it is; ProConError if it is one of others."""
    was_there = (path / MANIFEST).exists()
    try:
        found = Anchors(path).manifest
    except ProConError as error:
        if was_there:
            warnings.warn(f"{error}; they are recorded again", stacklevel=5)
        for file in shard_files(path, manifest["fingerprint"]):
            file.unlink(missing_ok=True)
        save_json({**manifest, "checksum": json_checksum(manifest)}, path / MANIFEST)
        return
    if found != manifest:
        raise ProConError(
            f"anchors in {str(path)!r} were recorded for another model state or precision, directions, blocks or "
            "scope: give another folder, or delete this one to record again"
        )
