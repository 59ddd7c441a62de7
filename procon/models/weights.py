"""Which model is this? Hashes of the weights that it computes with, sharded or not, and of how it does."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from procon.models.decoder import transformers_model
from procon.models.devices import offloaded

#: Values per row of the table in which the bits of a tensor are summed.
_COLUMNS = 4093

#: Of a configuration, what changes no hidden state of a forward in eval mode: where it comes from, what it was saved
#: with, what is returned beside the hidden states, what only training or generation reads. Weights' dtype is known
#: otherwise. So are names that begin with an underscore, and numbers of special tokens.
_VOLATILE = {
    "architectures",
    "auto_map",
    "attention_dropout",
    "dtype",
    "id2label",
    "initializer_range",
    "label2id",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "problem_type",
    "return_dict",
    "router_aux_loss_coef",
    "tokenizer_class",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}


def weights_hash(model: nn.Module) -> str:
    """A short hash of all that a model computes with: parameters, buffers and the scales of quantised ones, and which
    adapters are on, how strongly. The same on every device, sharded or not, and whatever floating dtype holds the
    values. If they are sharded, all ranks must call."""
    return _hash(model, only_frozen=False)


def frozen_hash(model: nn.Module) -> str:
    """As :func:`weights_hash`, of what does not train: the same as training starts, goes on and ends."""
    return _hash(model, only_frozen=True)


def _hash(model: nn.Module, *, only_frozen: bool) -> str:
    digest = hashlib.sha256()
    # First: it brings weights that bitsandbytes has repacked for a CPU back to what they were.
    state = model.state_dict(keep_vars=True)
    tensors = {own_name(name): parameter for name, parameter in model.named_parameters()}
    known = {id(tensor) for tensor in tensors.values()}
    tensors |= {name: value for name, value in state.items() if isinstance(value, Tensor) and id(value) not in known}
    for name, tensor in sorted(tensors.items()):
        if only_frozen and tensor.requires_grad:
            continue
        value = value_in(model, name, tensor)
        flat = value.reshape(-1).float() if value.is_floating_point() else value.reshape(-1)
        bits = flat.view(torch.int32) if flat.is_floating_point() else flat
        digest.update(f"{name}{tuple(value.shape)}".encode())
        digest.update(_sums(bits).cpu().numpy().tobytes())
        # Some values in their places.
        digest.update(flat[:: max(1, flat.numel() // 1024)].cpu().numpy().tobytes())
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            scales = [(adapter, str(getattr(module, "scaling", {}).get(adapter))) for adapter in module.active_adapters]
            digest.update(f"{own_name(name)}{scales}{module.disable_adapters}".encode())
    return digest.hexdigest()[:16]


def configuration_hash(model: nn.Module) -> str:
    """A short hash of how a model computes with its weights: its configuration without what changes no hidden state of
    a forward in eval mode, and the buffers that are made from it, such as the frequencies of rotary positions.

    Of buffers, dtypes and about two digits count: devices differ in the last ones. If they are sharded, all ranks must
    call.
    """
    digest = hashlib.sha256()
    model = transformers_model(model)
    config = _without_volatile(model.config.to_dict())
    digest.update(json.dumps(config, sort_keys=True, default=_text).encode())
    persistent = {id(value) for value in model.state_dict(keep_vars=True).values()}
    for module_name, module in model.named_modules():
        # Frequencies that follow the longest sequence so far come with those that they started from.
        moving = "inv_freq" if {"dynamic", "longrope"} & set(re.findall(r"\w+", _rope_type(module))) else ""
        for name, buffer in module.named_buffers(recurse=False):
            if id(buffer) in persistent or (moving and name.endswith(moving) and "original" not in name):
                continue
            digest.update(f"{own_name(f'{module_name}.{name}')}{tuple(buffer.shape)}{buffer.dtype}".encode())
            value = whole(buffer)
            value = torch.view_as_real(value) if value.is_complex() else value
            value = value.to(torch.bfloat16).view(torch.int16) if value.is_floating_point() else value
            digest.update(_sums(value.reshape(-1)).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _without_volatile(config: Any) -> Any:
    if isinstance(config, dict):
        kept = {str(name): value for name, value in config.items() if name not in _VOLATILE}
        return {
            name: _without_volatile(value)
            for name, value in kept.items()
            if not name.startswith("_") and not name.endswith("token_id")
        }
    return [_without_volatile(value) for value in config] if isinstance(config, list | tuple) else config


def _text(value: object) -> str:
    """Of what JSON has no word for; an object's own text may have its address."""
    return str(value) if isinstance(value, torch.dtype) else type(value).__name__


def _rope_type(module: nn.Module) -> str:
    return str(getattr(module, "rope_type", ""))


def _sums(bits: Tensor) -> Tensor:
    """All of ``bits [n]`` in sums that no order of summing changes, over the columns of a table. Its width is a prime,
    so that hardly any change of places, least of all of rows or columns of the tensor, leaves them the same."""
    even = len(bits) // _COLUMNS * _COLUMNS
    return torch.cat([bits[:even].view(-1, _COLUMNS).sum(0, dtype=torch.int64), bits[even:].long()])


def own_name(name: str) -> str:
    """A module's or tensor's name without what activation checkpointing and ``torch.compile`` wrap it in."""
    return name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")


def value_in(model: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """A parameter or buffer of ``model`` in one piece, wherever it lies: on another rank, in memory, or on the disk."""
    return offloaded(model, name) if tensor.is_meta else whole(tensor)


def whole(tensor: Tensor) -> Tensor:
    """A parameter or buffer in one piece, wherever FSDP2 or DeepSpeed ZeRO-3 keep the rest of it."""
    if isinstance(tensor, DTensor):
        return tensor.full_tensor().detach()
    if hasattr(tensor, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    return tensor.detach()
