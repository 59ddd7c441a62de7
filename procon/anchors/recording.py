"""The projections of the sequences of a loader, from the model as it now is, sharded or not."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from procon.anchors.exchange import gather
from procon.anchors.packing import check_packing
from procon.anchors.precision import ONE_TOKEN
from procon.anchors.projections import project_sites
from procon.anchors.shards import Key
from procon.errors import ProConError
from procon.models import Decoder, decoder_forward, find_decoder, is_sharded, model_device, site_name
from procon.sequences import TokenSequence, decoder_inputs, split_batch
from procon.settings import Backend, TokenScope


def record_projections(
    model: nn.Module,
    dataloader: Iterable[Mapping[str, Tensor]],
    directions: Tensor,
    blocks: Sequence[int],
    scope: TokenScope,
    backend: Backend,
    known: Container[Key],
) -> Iterator[tuple[Key, np.ndarray]]:
    """Key and projections ``[tokens in scope, blocks * K]`` fp32 of each sequence that is not ``known``, once each.

    The base decoder runs, without the LM head, on batches that have such a sequence; the whole model, with the LM head
    on one token, if more than its modules makes the forward. If parameters are sharded over the ranks (FSDP2,
    DeepSpeed ZeRO-3), every rank must take part in every forward: ranks iterate together until none has a batch left,
    and those that have nothing new run one token.

    Args:
        model: in eval mode, gradients disabled; not wrapped for data parallelism.
        directions: ``[L, K, D]`` unit directions of all blocks; ``[L + 1, K, D]`` with the output of the last block.
        blocks: indices of blocks, whose inputs are projected; ``L`` for the output of the last block.

    Raises:
        ProConError: on projections that are not finite, inputs that a text decoder does not take, or a decoder that
            does not keep the sequences of a packed row apart.
    """
    sharded = is_sharded(model)
    decoder = find_decoder(model)
    forward = decoder_forward(model)
    device = model_device(model)
    unit = directions.to(device)
    batches = iter(dataloader)
    seen: set[Key] = set()
    checked = False
    while True:
        batch = next(batches, None)
        sequences = list(split_batch(batch)) if batch is not None else []
        new = {}
        for sequence in sequences:
            key = sequence.key()
            if key not in seen and key not in known:
                seen.add(key)
                new[key] = sequence
        packed = len(sequences) > len({sequence.row for sequence in sequences})
        state = None if batch is None else (bool(new), packed)
        states = [state for state in (gather(state) if sharded else [state]) if state is not None]
        if not states:
            return
        if not checked and any(packed for _, packed in states):
            inputs = decoder_inputs(batch or ONE_TOKEN, device)
            check_packing(forward, decoder, inputs, sequences)
            checked = True
        if not any(new for new, _ in states):
            continue
        z = _project_batch(forward, decoder, batch if batch and new else ONE_TOKEN, unit, blocks, backend, device)
        for key, sequence in new.items():
            rows = z[sequence.row, sequence.span][torch.from_numpy(sequence.in_scope(scope))]
            _check_finite(rows, blocks, sequence, len(decoder.blocks))
            yield key, rows.numpy()


def _project_batch(
    forward: Callable[..., object],
    decoder: Decoder,
    batch: Mapping[str, Tensor],
    unit: Tensor,
    blocks: Sequence[int],
    backend: Backend,
    device: torch.device,
) -> Tensor:
    """Projections ``[B, T, blocks * K]`` fp32 on the CPU."""
    inputs = decoder_inputs(batch, device)
    rows = len(batch["input_ids"])
    return project_sites(lambda: forward(**inputs), decoder, unit, blocks, rows=rows, backend=backend, device="cpu")[1]


def _check_finite(z: Tensor, blocks: Sequence[int], sequence: TokenSequence, count: int) -> None:
    bad = ~torch.isfinite(z).unflatten(-1, (len(blocks), -1)).all(-1).all(0)
    if bad.any():
        where = site_name(blocks[int(bad.nonzero()[0])], count)
        raise ProConError(
            f"hidden states {where} are NaN or infinite on the sample of {len(sequence.input_ids)} tokens starting "
            f"{sequence.input_ids[:24].tolist()}: load the model in bfloat16 or float32, and check its weights"
        )
