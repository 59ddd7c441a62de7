"""The penalty's gradient by its definition: float64, one unpadded sequence at a time."""

from __future__ import annotations

import copy
from pathlib import Path

import bitsandbytes as bnb
import setting
import torch
from torch import Tensor, nn

from procon.models import find_decoder, observe_block_inputs

#: Token ids of a sequence, and which of them are constrained.
Sequence = tuple[list[int], list[bool]]


def of_tokens(parameters: str, folder: Path, batches: list[list[Sequence]]) -> dict[str, Tensor]:
    """Of ``ALPHA`` * the mean over ``batches`` of each one's mean over its constrained tokens and the blocks."""
    start, moved = _models(parameters, folder)
    total = torch.zeros(()).double()
    for batch in batches:
        departures = [_departures(start, moved, ids)[:, torch.tensor(constrained)] for ids, constrained in batch]
        total = total + torch.cat(departures, 1).square().mean()
    (setting.ALPHA * total / len(batches)).backward()
    return setting.gradients(moved)


def of_probes(parameters: str, folder: Path) -> dict[str, Tensor]:
    """Of ``ALPHA * PROBE_WEIGHT`` * the mean squared departure of the last states at the probes' last tokens."""
    start, moved = _models(parameters, folder)
    prompts = [setting.rendered(prompt) for prompt in setting.probes()]
    departures = torch.stack([_last_state(moved, ids) - _last_state(start, ids).detach() for ids in prompts])
    (setting.ALPHA * setting.PROBE_WEIGHT * departures.square().mean()).backward()
    return setting.gradients(moved)


def _models(parameters: str, folder: Path) -> tuple[nn.Module, nn.Module]:
    start = _plain(setting.model(parameters, folder)).double().eval()
    moved = copy.deepcopy(start)
    setting.move(moved)
    return start, moved


def _departures(start: nn.Module, moved: nn.Module, ids: list[int]) -> Tensor:
    """``[BLOCKS, T]``: projections less those of the start."""
    with torch.no_grad():
        anchors = _projections(start, ids)
    return _projections(moved, ids) - anchors


def _projections(module: nn.Module, ids: list[int]) -> Tensor:
    unit = setting.directions().basis[:, 0].double()
    inputs = [None] * setting.BLOCKS
    with observe_block_inputs(find_decoder(module), lambda block, hidden: inputs.__setitem__(block, hidden[0])):
        module(input_ids=torch.tensor([ids]), use_cache=False)
    return torch.stack([hidden @ unit[block] for block, hidden in enumerate(inputs)])


def _last_state(module: nn.Module, ids: list[int]) -> Tensor:
    """``[D]``: after the final norm, at the last token."""
    return module(input_ids=torch.tensor([ids]), use_cache=False, output_hidden_states=True).hidden_states[-1][0, -1]


def _plain(module: nn.Module) -> nn.Module:
    """Quantised layers as the linear layers that they stand for."""
    for name, child in list(module.named_children()):
        if isinstance(child, bnb.nn.Linear4bit):
            weight = bnb.functional.dequantize_4bit(child.weight.data, child.weight.quant_state)
            linear = nn.Linear(child.in_features, child.out_features, bias=child.bias is not None)
            linear.weight = nn.Parameter(weight.float(), requires_grad=False)
            setattr(module, name, linear)
        else:
            _plain(child)
    return module
