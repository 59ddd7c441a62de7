"""Which model is this? Hashes of the weights that it computes with, sharded or not, of how it does, and its origin."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any, Literal

import torch
from accelerate.utils import align_module_device
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from procon.models.decoder import token_embedding, transformers_model, unwrapped

#: Values per row of the table in which the bits of a tensor are summed.
_COLUMNS = 4093

#: Of a configuration, what changes no hidden state of a forward in eval mode, and differs between a model and what was
#: saved of it. Weights' dtype is known otherwise. So are names that begin with an underscore, and special tokens.
_VOLATILE = {
    "architectures",
    "attention_dropout",
    "auto_map",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}

#: How a model is related to an earlier one.
Relation = Literal["same", "other weights", "another model", "unknown"]

#: Cosine between values of the token embedding of one model before and after whatever was done to it, at least. Those
#: of two models have one of 0, give or take a tenth.
_RELATED = 0.5


def weights_hash(model: nn.Module, *, only_frozen: bool = False) -> str:
    """A short hash of all that a model computes with: parameters, buffers and the scales of quantised ones, and which
    adapters are on, how strongly. The same on every device, sharded or not, and whatever floating dtype holds the
    values. ``only_frozen`` leaves out what trains: the rest is the same as training starts, goes on and ends. If
    parameters are sharded, all ranks must call.
    """
    digest = hashlib.sha256()
    # First: it brings weights that bitsandbytes has repacked for a CPU back to what they were.
    state = model.state_dict(keep_vars=True)
    tensors = {_own_name(name): parameter for name, parameter in model.named_parameters()}
    known = {id(tensor) for tensor in tensors.values()}
    tensors |= {name: value for name, value in state.items() if isinstance(value, Tensor) and id(value) not in known}
    for name, tensor in sorted(tensors.items()):
        if only_frozen and tensor.requires_grad:
            continue
        value = _whole(model, name, tensor)
        flat = value.reshape(-1).float() if value.is_floating_point() else value.reshape(-1)
        bits = flat.view(torch.int32) if flat.is_floating_point() else flat
        # Sums over the columns of a table, which no order of summing changes. Its width is a prime, so that hardly any
        # change of places, least of all of rows or columns of the tensor, leaves them the same.
        even = len(bits) // _COLUMNS * _COLUMNS
        sums = torch.cat([bits[:even].view(-1, _COLUMNS).sum(0, dtype=torch.int64), bits[even:].long()])
        digest.update(f"{name}{tuple(value.shape)}".encode())
        digest.update(sums.cpu().numpy().tobytes())
        # Some values in their places.
        digest.update(flat[:: max(1, flat.numel() // 1024)].cpu().numpy().tobytes())
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            scales = [(adapter, str(getattr(module, "scaling", {}).get(adapter))) for adapter in module.active_adapters]
            digest.update(f"{_own_name(name)}{scales}{module.disable_adapters}".encode())
    return digest.hexdigest()[:16]


def configuration_hash(model: nn.Module) -> str:
    """A short hash of how a model computes with its weights: its configuration without what changes no hidden state of
    a forward in eval mode, and the dtypes of buffers that are made from it, such as rotary frequencies."""
    model = transformers_model(model)
    persistent = {id(value) for value in model.state_dict(keep_vars=True).values()}
    made = {_own_name(name): str(value.dtype) for name, value in model.named_buffers() if id(value) not in persistent}
    # By its type, as an object's own text may have its address.
    text = json.dumps([_lasting(model.config.to_dict()), made], sort_keys=True, default=lambda one: type(one).__name__)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _lasting(config: Any) -> Any:
    """A configuration without what is volatile."""
    if isinstance(config, list | tuple):
        return [_lasting(value) for value in config]
    if not isinstance(config, dict):
        return config
    names = (name for name in config if name not in _VOLATILE and not str(name).startswith("_"))
    return {str(name): _lasting(config[name]) for name in names if not str(name).endswith("token_id")}


def origin_of(model: nn.Module) -> dict[str, Any]:
    """What to keep of a model beside something that is measured on it, ready for JSON.

    The same weights in float32 and bfloat16 have one origin, and so have a model and the same one with an adapter that
    does nothing yet. If parameters are sharded, all ranks must call.
    """
    base = transformers_model(unwrapped(model))
    tuners = {f"{name}.": module for name, module in base.named_modules() if isinstance(module, BaseTunerLayer)}
    digests = {False: hashlib.sha256(), True: hashlib.sha256()}
    moved = False
    for name, parameter in sorted(base.named_parameters()):
        tuner = next((start for start in tuners if name.startswith(start)), "")
        is_adapter = ".modules_to_save." in name or bool(tuner and not name.startswith(f"{tuner}base_layer."))
        if is_adapter and tuner and tuners[tuner].disable_adapters:
            continue
        tensor = _whole(base, name, parameter)
        values = tensor.reshape(-1)[:: max(1, tensor.numel() // 1024)]
        values = values.to(torch.bfloat16).view(torch.int16) if values.is_floating_point() else values
        plain = re.sub(r"\.(base_layer|original_module)(?=\.)", "", _own_name(name))  # as without adapters
        digests[is_adapter].update(f"{plain}{tuple(tensor.shape)}".encode() + values.cpu().numpy().tobytes())
        # LoRA starts with zeros in B, and then does nothing. Of other kinds it is not known what does nothing.
        moved |= is_adapter and ("lora_" not in name or ("lora_A" not in name and bool(tensor.any())))
    embedding = token_embedding(base)
    weight = _whole(embedding, "weight", embedding.weight)
    # A few of the first rows, which any vocabulary has; none if values are not kept as such.
    first = weight[:4096] if weight.is_floating_point() and weight.dim() == 2 else weight[:0, None]
    few = first[:: max(1, len(first) // 32), :: max(1, first.shape[1] // 4)]
    return {
        "architecture": base.config.get_text_config().model_type,
        "weights": digests[False].hexdigest()[:16],
        "adapters": digests[True].hexdigest()[:16] if moved else None,
        "embedding": [float(f"{value:.3g}") for value in few.nan_to_num(0.0, 0.0, 0.0).flatten().tolist()],
    }


def compare_origin(kept: dict[str, Any] | None, now: dict[str, Any]) -> Relation:
    """How the model of which :func:`origin_of` gave ``now`` is related to that of ``kept``; "unknown" without one.

    Another model is recognised by values of the token embedding, which are unrelated. Those of the same model, but
    fine-tuned, quantised, or with an adapter merged, have hardly moved.
    """
    if not kept:
        return "unknown"
    before, after = kept["embedding"], now["embedding"]
    if {**kept, "embedding": after} == now:
        return "same"
    related = len(before) == len(after) and kept["architecture"] == now["architecture"]
    if related and after:
        one, other = torch.tensor(before, dtype=torch.float64), torch.tensor(after, dtype=torch.float64)
        related = float(torch.nn.functional.cosine_similarity(one, other, dim=0)) >= _RELATED
    return "other weights" if related else "another model"


def _own_name(name: str) -> str:
    """A module's or tensor's name without what activation checkpointing and ``torch.compile`` wrap it in."""
    return name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")


def _whole(model: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """A parameter or buffer in one piece, wherever a device map, FSDP2 or DeepSpeed ZeRO-3 keep it."""
    if tensor.is_meta:
        owner, _, own = name.rpartition(".")
        module = model.get_submodule(owner)
        with align_module_device(module, torch.device("cpu")):
            return getattr(module, own).detach().clone()
    if isinstance(tensor, DTensor):
        return tensor.full_tensor().detach()
    if hasattr(tensor, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    return tensor.detach()
