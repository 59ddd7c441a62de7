"""Does a model keep the sequences of a packed row apart? Tried once, before anchors are recorded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from procon.errors import ProConError
from procon.models import Decoder, observe_block_inputs
from procon.sequences import TokenSequence

#: Relative change of a hidden state that counts as rounding, at least, and in units of the dtype's resolution: where
#: tokens are routed to experts, the other tokens of a row change the shapes, and with them the order, of sums.
_ROUNDING = 1e-4
_ROUNDING_UNITS = 4

#: Tokens of a sequence that are watched for a trace of the one before it. Not the first alone: some models give that
#: one a state so large that nothing else shows in it.
_WATCHED = 8


def check_packing(
    forward: Callable[..., Any], decoder: Decoder, inputs: Mapping[str, Any], sequences: Sequence[TokenSequence]
) -> None:
    """Raise ProConError if, in a packed row, what comes before a sequence changes its hidden states.

    Then neither are its anchors its own, nor is what it is trained on. Many decoders mix the sequences of a row
    without a word: recurrent and convolutional blocks that do not get the bounds, attention whose mask is made
    without ``position_ids``. So the batch runs twice, the second time with other tokens before the last sequence of
    each row, which that sequence must not notice.

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
