"""Which weights are these? A hash of all that a model computes with, sharded or not."""

from __future__ import annotations

import hashlib

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def weights_hash(model: nn.Module) -> str:
    """A short hash of all that a model computes with: parameters, buffers and the scales of quantised ones, and which
    adapters are on, how strongly. The same on every device, sharded or not, and whatever floating dtype holds the
    values. If they are sharded, all ranks must call."""
    digest = hashlib.sha256()
    # First: it brings weights that bitsandbytes has repacked for a CPU back to what they were.
    state = model.state_dict(keep_vars=True)
    tensors = {_own_name(name): parameter for name, parameter in model.named_parameters()}
    known = {id(tensor) for tensor in tensors.values()}
    tensors |= {name: value for name, value in state.items() if isinstance(value, Tensor) and id(value) not in known}
    for name, tensor in sorted(tensors.items()):
        whole = _whole(tensor)
        flat = whole.reshape(-1).float() if whole.is_floating_point() else whole.reshape(-1)
        bits = flat.view(torch.int32) if flat.is_floating_point() else flat
        digest.update(f"{name}{tuple(whole.shape)}".encode())
        # All bits in a sum that no order of summing changes, and some values in their places.
        digest.update(str(int(bits.sum(dtype=torch.int64))).encode())
        digest.update(flat[:: max(1, flat.numel() // 1024)].cpu().numpy().tobytes())
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            scales = [(adapter, str(getattr(module, "scaling", {}).get(adapter))) for adapter in module.active_adapters]
            digest.update(f"{_own_name(name)}{scales}{module.disable_adapters}".encode())
    return digest.hexdigest()[:16]


def _own_name(name: str) -> str:
    """A module's or tensor's name without what activation checkpointing and ``torch.compile`` wrap it in."""
    return name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")


def _whole(tensor: Tensor) -> Tensor:
    """A parameter or buffer in one piece, wherever FSDP2 or DeepSpeed ZeRO-3 keep the rest of it."""
    if isinstance(tensor, DTensor):
        return tensor.full_tensor().detach()
    if hasattr(tensor, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    return tensor.detach()
