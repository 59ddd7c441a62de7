"""The projections of the sequences of a loader, from the model as it now is, sharded or not."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from procon.directions import Directions
from procon.errors import ProConError
from procon.models import Decoder, DecoderForward, find_decoder, is_sharded, observe_block_inputs
from procon.ops import project
from procon.ranks import gather
from procon.sequences import TokenSequence, decoder_inputs, split_batch
from procon.settings import TokenScope

_Result = TypeVar("_Result")

#: What a model runs to show something of itself, or while other ranks need its part of the parameters.
ONE_TOKEN = {"input_ids": torch.zeros(1, 1, dtype=torch.int64)}

#: Relative change of a hidden state that counts as rounding, at least, and in units of the dtype's resolution: where
#: tokens are routed to experts, the other tokens of a row change the shapes, and with them the order, of sums.
_ROUNDING = 1e-4
_ROUNDING_UNITS = 4

#: Tokens of a sequence that are watched for a trace of the one before it. Not the first alone: some models give that
#: one a state so large that nothing else shows in it.
_WATCHED = 8


def checked_blocks(model: nn.Module, directions: Directions, blocks: Sequence[int] | None) -> tuple[int, ...]:
    """``blocks`` as they are, or all that have a direction. If weights are sharded, all ranks must call.

    Raises:
        ProConError: if the directions do not fit the model, or are of another one.
    """
    directions.check_fits(find_decoder(model))
    directions.check_origin(model)
    if blocks is None:
        blocks = directions.usable.nonzero().flatten().tolist()
    return tuple(map(int, blocks))


def project_block_inputs(
    run: Callable[[], _Result],
    decoder: Decoder,
    basis: Tensor,
    blocks: Sequence[int],
    *,
    rows: int,
    device: torch.device | str,
) -> tuple[_Result, Tensor]:
    """What ``run()`` gives, and the projections ``[rows, T, len(blocks) * K]`` fp32 of the sequences that it runs.

    Args:
        run: makes one forward of ``decoder``, or several, each on some of the rows; what comes after them is left out.
        basis: ``[L, K, D]`` unit directions of all blocks.
        blocks: indices of the blocks whose inputs are projected.
        device: where the projections go.

    Raises:
        ProConError: if a block does not run, or not on all rows.
    """
    found: dict[int, list[Tensor]] = {block: [] for block in blocks}

    def observe(block: int, hidden: Tensor) -> None:
        taken = found.get(block)
        if taken is not None and sum(map(len, taken)) < rows:
            taken.append(project(hidden, basis[block].to(hidden.device)).to(device, torch.float32))

    with observe_block_inputs(decoder, observe):
        result = run()
    for block, taken in found.items():
        if sum(map(len, taken)) != rows:
            raise ProConError(
                f"block {block} ran on {sum(map(len, taken))} of {rows} sequences, so they have no anchors: constrain "
                "only blocks that run"
            )
    z = torch.stack([taken[0] if len(taken) == 1 else torch.cat(taken) for taken in found.values()], -2)
    return result, z.flatten(-2)


def record_projections(
    model: nn.Module,
    dataloader: Iterable[Mapping[str, Tensor]],
    directions: Tensor,
    blocks: Sequence[int],
    scope: TokenScope,
    known: Container[int],
) -> Iterator[tuple[int, np.ndarray]]:
    """Key and projections ``[tokens in scope, blocks * K]`` fp32 of each sequence that is not ``known``, once each.

    The base decoder runs, without the LM head, on batches that have such a sequence. If parameters are sharded over the
    ranks (FSDP2, DeepSpeed ZeRO-3), every rank must take part in every forward: ranks iterate together until none has a
    batch left, and those that have nothing new run one token.

    Args:
        model: in eval mode, gradients disabled; not wrapped for data parallelism.
        directions: ``[L, K, D]`` unit directions of all blocks.
        blocks: indices of the blocks whose inputs are projected.

    Raises:
        ProConError: on projections that are not finite, inputs that a text decoder does not take, or a decoder that
            does not keep the sequences of a packed row apart.
    """
    sharded = is_sharded(model)
    forward = DecoderForward(model)
    decoder, device = forward.decoder, forward.device
    unit = directions.to(device)
    batches = iter(dataloader)
    seen: set[int] = set()
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
            check_packing(forward.run, decoder, decoder_inputs(batch or ONE_TOKEN, device), sequences)
            checked = True
        if not any(new for new, _ in states):
            continue
        inputs = decoder_inputs(batch if batch and new else ONE_TOKEN, device)
        rows = len(inputs["input_ids"])
        _, z = project_block_inputs(partial(forward.run, **inputs), decoder, unit, blocks, rows=rows, device="cpu")
        for key, sequence in new.items():
            z_of_tokens = z[sequence.row, sequence.span][torch.from_numpy(sequence.in_scope(scope))]
            _check_finite(z_of_tokens, blocks, sequence)
            yield key, z_of_tokens.numpy()


def check_packing(
    forward: Callable[..., Any], decoder: Decoder, inputs: Mapping[str, Any], sequences: Sequence[TokenSequence]
) -> None:
    """Raise ProConError if, in a packed row, what comes before a sequence changes its hidden states.

    Many decoders mix the sequences of a row without a word: recurrent and convolutional blocks that do not get the
    bounds, attention whose mask is made without ``position_ids``. So the batch runs twice, the second time with other
    tokens before the last sequence of each row, which that sequence must not notice.

    Args:
        forward: runs ``decoder`` on ``inputs``; under sharded parameters all ranks must call.
        sequences: of the batch, by row and start.
    """
    first = {sequence.row: sequence.start for sequence in reversed(sequences)}
    last = {sequence.row: sequence for sequence in sequences}
    watched = [
        (row, slice(sequence.start, sequence.start + min(_WATCHED, len(sequence.input_ids))))
        for row, sequence in last.items()
        if sequence.start > first[row]
    ]
    changed = inputs["input_ids"].clone()
    for row, span in watched:
        changed[row, first[row] : span.start] = changed[row, span.start]
    states = []

    def observe(block: int, hidden: Tensor) -> None:
        if block == len(decoder.blocks) - 1:
            states.append(torch.cat([hidden[:0, 0], *(hidden[row, span] for row, span in watched)]))

    with observe_block_inputs(decoder, observe):
        forward(**inputs)
        forward(**{**inputs, "input_ids": changed})
    before, after = (state.float() for state in states)
    device_type = before.device.type
    autocast = torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type) if autocast else states[0].dtype
    tolerance = max(_ROUNDING, _ROUNDING_UNITS * torch.finfo(dtype).eps)
    if ((after - before).norm(dim=-1) > tolerance * before.norm(dim=-1)).any():
        raise ProConError(
            f"{type(decoder.module).__name__} with attn_implementation {decoder.attn_implementation!r} "
            "lets the sequences of a packed row see each other: pad them instead of packing or flattening"
        )


def _check_finite(z: Tensor, blocks: Sequence[int], sequence: TokenSequence) -> None:
    bad = ~torch.isfinite(z).unflatten(-1, (len(blocks), -1)).all(-1).all(0)
    if bad.any():
        raise ProConError(
            f"hidden states entering block {blocks[int(bad.nonzero()[0])]} are NaN or infinite on the sample of "
            f"{len(sequence.input_ids)} tokens starting {sequence.input_ids[:24].tolist()}: load the model in bfloat16 "
            "or float32, and check its weights"
        )
