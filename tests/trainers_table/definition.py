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
    """Of ``ALPHA * PROBE_WEIGHT`` * the divergence of predictions: along replies, and where they begin."""
    start, moved = _models(parameters, folder)
    along, begins = [], []
    for prompt in map(setting.rendered, setting.probes()):
        ids = prompt + _reply(start, prompt)
        divergence = _divergence(_predictions(start, ids).detach(), _predictions(moved, ids))[len(prompt) - 1 :]
        along.append(divergence)
        begins.append(divergence[0])
    penalty = torch.cat(along).mean() + torch.stack(begins).mean()
    (setting.ALPHA * setting.PROBE_WEIGHT * penalty).backward()
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


def _predictions(module: nn.Module, ids: list[int]) -> Tensor:
    """``[T, V]``: log-probabilities of the next token."""
    return module(input_ids=torch.tensor([ids]), use_cache=False).logits[0].log_softmax(1)


@torch.no_grad()
def _reply(module: nn.Module, prompt: list[int]) -> list[int]:
    """What the module says next, greedily, without what ends it."""
    reply: list[int] = []
    while len(reply) < setting.REPLY_TOKENS:
        token = int(_predictions(module, prompt + reply)[-1].argmax())
        if token == setting.END:
            break
        reply.append(token)
    return reply


def _divergence(start: Tensor, now: Tensor) -> Tensor:
    """``[T]``: ``KL(start || now)`` over the 32 likeliest tokens of the start, and all others as one."""
    likely = start.topk(32).indices
    start, now = (
        torch.cat([part.gather(1, likely), (1 - part.gather(1, likely).exp().sum(1, keepdim=True)).log()], 1)
        for part in (start, now)
    )
    return (start.exp() * (start - now)).sum(1)


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
