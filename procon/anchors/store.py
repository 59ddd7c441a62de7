"""Anchors: the projections of every training token at the start, recorded once and looked up by content.

They take a float for each constrained token, block and direction, so no reference model stays in memory and no step
runs a second forward.
"""

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

from procon.anchors.checked_blocks import checked_blocks
from procon.anchors.exchange import gather, on_all_ranks, own_rank, share_files
from procon.anchors.manifest import MANIFEST, Manifest
from procon.anchors.mending import mend
from procon.anchors.precision import running_precision
from procon.anchors.recording import record_projections
from procon.anchors.shards import AnchorShards, ShardWriter
from procon.anchors.token_mask import mask_tokens
from procon.directions import Directions
from procon.errors import ProConError
from procon.models import configuration_hash, evaluating, token_embedding, unwrapped, weights_hash
from procon.sequences import TokenSequence
from procon.settings import DEFAULTS, Backend, TokenScope, check_setting


class Anchors:
    """An opened store of initial projections ``z0`` (paper section III-C1).

    The folder holds safetensors shards (fp32, read lazily) and a manifest. Sequences are found by a hash of their own
    unpadded token ids and label mask, so shuffling, batching, padding and packing may all change.

    Its columns are the recorded blocks, in order; with ``K`` directions per block, ``K`` columns for each of them.

    Args:
        path: a folder that :meth:`record` completed.

    Raises:
        ProConError: if it is missing or damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        manifest = Manifest.read(self.path)
        self.fingerprint = manifest.fingerprint
        self.blocks = manifest.blocks
        self.scope: TokenScope = manifest.scope
        self.k = manifest.k
        self._shards = AnchorShards(self.path, manifest.fingerprint, manifest.columns)

    @classmethod
    def reopen(cls, path: str | Path) -> Anchors:
        """The store that any host of the process group has in ``path``; all ranks must call.

        Hosts that lack it, as one that took another's place in a resumed run does, get a copy.

        Raises:
            ProConError: if no host has it, or it is damaged.
        """
        path = Path(path)
        if any(gather((path / MANIFEST).exists())):
            path.mkdir(parents=True, exist_ok=True)
            for pattern in ("*.safetensors", MANIFEST):
                share_files(path, pattern)
        return cls(path)

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self._shards)

    def __contains__(self, sequence: TokenSequence) -> bool:
        return sequence.key() in self._shards

    def check_fits(self, model: nn.Module, directions: Directions) -> None:
        """Raise ProConError unless these are the anchors of ``model`` as it now is, with the adapters that are on.

        For a loop that opens anchors instead of recording them; takes a pass over all weights, and one forward: call it
        under the autocast that training has.
        """
        found = fingerprint(unwrapped(model), directions, self.blocks, self.scope)
        if found != self.fingerprint:
            raise ProConError(
                f"anchors in {str(self.path)!r} were recorded for another model state or precision, other adapters or "
                "directions: record them from the model that training starts from, as it trains"
            )

    def lookup(self, sequence: TokenSequence, describe: Callable[[Sequence[int]], str] | None = None) -> np.ndarray:
        """Projections of the constrained tokens of one sequence: ``[tokens in scope, blocks * K]`` fp32.

        Args:
            describe: makes a text of token ids, for the error.

        Raises:
            ProConError: if the sequence was not recorded, was recorded with other labels, or is damaged on the disk.
        """
        key = sequence.key()
        rows = self._shards.read(key)
        if rows is None:
            start = sequence.input_ids[:24].tolist()
            what = "was recorded with other labels" if self._shards.has_tokens(key) else "has no anchors"
            raise ProConError(
                f"sample of {len(sequence.input_ids)} tokens starting {describe(start) if describe else str(start)!r} "
                f"{what} in {str(self.path)!r}: train on the data that anchors were recorded for, or record again from "
                "the starting model"
            )
        return rows

    def annotate(self, batch: dict[str, Any], describe: Callable[[Sequence[int]], str] | None = None) -> dict[str, Any]:
        """Add ``anchors`` ``[B, T, blocks * K]`` and ``constraint_mask`` ``[B, T]``, fp32, 1 on tokens in scope.

        Args:
            batch: on the CPU, padded, packed or flattened (see :func:`procon.sequences.split_batch`).
            describe: makes a text of token ids, for errors.

        Raises:
            ProConError: for a sequence that is not in the store, naming it, and for a batch that is not of text alone.
        """
        mask, sequences = mask_tokens(batch, self.scope)
        anchors = torch.zeros(*mask.shape, len(self.blocks) * self.k)
        for sequence, chosen in sequences:
            anchors[sequence.row, sequence.span][chosen] = torch.from_numpy(self.lookup(sequence, describe))
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
        backend: Backend = "auto",
        progress: bool = True,
        fingerprint: str | None = None,
    ) -> Anchors:
        """Record the projections of all sequences of ``dataloader`` under ``model`` as it now is.

        Runs the base decoder only (no LM head), in eval mode without gradients. Sequences already in the folder are
        verified and skipped, so an interrupted recording goes on where it stopped, a grown data set records only what
        is new, and what was damaged is recorded again, with a warning that says how much.

        Under ``torch.distributed`` all ranks must call. Afterwards each finds the sequences of all in its own ``path``,
        on a file system that they share or not: hosts then send each other the files that they lack.

        Args:
            model: a transformers causal LM, also within PEFT, DDP, FSDP2 or DeepSpeed.
            dataloader: batches with ``input_ids``, ``labels`` and what else the decoder needs. Under several ranks,
                each passes its own share, of any length; ranks that compute one batch together (tensor parallelism)
                pass the same.
            path: a folder; it may be another one on each host.
            blocks: indices of the blocks to record, ``L`` for the output of the last of L blocks; all block inputs
                that have a direction if not given.
            scope: which tokens of a sequence; a constraint acts on those that were recorded.
            backend: of :func:`procon.ops.project`.
            fingerprint: that of :func:`fingerprint`, if it is known: it takes a pass over all weights and a forward of
                one token, which shows whether autocast is on.

        Raises:
            ProConError: if the directions are of another model, or the folder belongs to another model state or
                precision, directions, blocks or scope; on projections that are not finite; or on inputs that a text
                decoder does not take.
        """
        check_setting("scope", scope)
        check_setting("backend", backend)
        model = unwrapped(model)
        blocks = checked_blocks(model, directions, blocks)
        path = Path(path)
        state = fingerprint or _fingerprint(model, directions, blocks, scope)
        try:
            manifest = Manifest(state, tuple(map(int, blocks)), scope, directions.k)
        except ValueError as error:
            raise ProConError(f"anchors cannot be recorded: {error}") from error
        _claim(path, manifest)
        mend(path, manifest)
        share_files(path, f"{state}-*.safetensors")  # of a recording that was interrupted
        writer = ShardWriter(path, state)
        known = AnchorShards(path, state, manifest.columns)
        batches = tqdm(dataloader, desc="anchors", unit="batch", disable=not progress or own_rank() != 0)
        with evaluating(model):
            for key, projections in record_projections(model, batches, directions.basis, blocks, scope, backend, known):
                writer.add(key, projections)
        writer.flush()
        share_files(path, f"{state}-*.safetensors")
        return cls(path)


def fingerprint(
    model: nn.Module,
    directions: Directions,
    blocks: Sequence[int],
    scope: TokenScope,
    precision: str | None = None,
) -> str:
    """A short hash of all that anchors depend on, the data aside; of a sharded model, all ranks must call.

    That is weights and dtype, the precision in which they run, configuration, directions, blocks and scope.

    Args:
        precision: that of Accelerate, ``"no"`` without, if it is known; else a forward of one token shows it.
    """
    precision = running_precision(model) if precision is None else precision
    forward = [weights_hash(model), configuration_hash(model), str(token_embedding(model).weight.dtype)]
    parts = [*forward, directions.hash, list(map(int, blocks)), scope]
    if precision != "no":
        parts.append(precision)
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


#: For where an argument has that name.
_fingerprint = fingerprint


def _claim(path: Path, manifest: Manifest) -> None:
    """Write the manifest, or check that the folder's own says the same: on every rank, and with one outcome."""
    if any(other != manifest for other in gather(manifest)):
        raise ProConError("the ranks' models differ in weights, or in what is to be recorded: load the same on each")
    on_all_ranks(lambda: _write_or_compare(path, manifest))


def _write_or_compare(path: Path, manifest: Manifest) -> None:
    found = Manifest.read_if_whole(path) if (path / MANIFEST).exists() else None
    if isinstance(found, str):
        warnings.warn(f"anchors manifest in {str(path)!r} was damaged ({found}): it is written again", stacklevel=4)
    if not isinstance(found, Manifest):
        manifest.write(path)
        found = Manifest.read(path)
    if found != manifest:
        raise ProConError(
            f"anchors in {str(path)!r} were recorded for another model state or precision, directions, blocks or "
            "scope: give another folder, or delete this one to record again"
        )
