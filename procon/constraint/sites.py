"""The places of the residual stream that can be constrained: each block's input, and the last block's output."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from procon.constraint.input_norm import InputNorm, find_input_norm, find_output_norm
from procon.models import Decoder
from procon.settings import Fuse


@dataclass(frozen=True)
class Site:
    """A place of the residual stream.

    Attributes:
        block: the block whose input it is, or whose output.
        is_output: whether it is the output: of the last block alone, since any other's is the next one's input.
        norm: the RMSNorm that reads it and can do the work, if there is one.
    """

    block: nn.Module
    is_output: bool
    norm: InputNorm | None


def find_site(decoder: Decoder, index: int, fuse: Fuse) -> Site:
    """Site ``index`` of a decoder: that block's input; with the index after the last block, the last one's output."""
    is_output = index == len(decoder.blocks)
    block = decoder.blocks[-1 if is_output else index]
    if fuse == "never":
        return Site(block, is_output, None)
    return Site(
        block, is_output, find_output_norm(decoder) if is_output else find_input_norm(block, decoder.hidden_size)
    )
