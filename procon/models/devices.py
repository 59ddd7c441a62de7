"""Where a model goes: the device of this process, or several that it is spread over, and what lies on none."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn

from procon.errors import ProConError


def default_device() -> torch.device:
    """This process's CUDA or ROCm GPU if there is one, else its XPU, else MPS, else the CPU."""
    number = int(os.environ.get("LOCAL_RANK", "0"))
    for kind in ("cuda", "xpu"):
        if _is_there(kind):
            return torch.device(kind, number)
    return torch.device("mps" if _is_there("mps") else "cpu")


def check_devices(device_map: Mapping[str, Any] | str | int | None) -> None:
    """Raise ProConError if a device map names a device that is not there."""
    named = device_map.values() if isinstance(device_map, Mapping) else [device_map]
    for device in named:
        kind, _, number = str(device).partition(":")
        if kind.isdigit():  # of the accelerator that there is
            kind, number = default_device().type, kind
        if kind in ("cuda", "xpu", "mps") and not (_is_there(kind) and int(number or 0) < _count(kind)):
            there = ", ".join(f"{_count(name)} x {name}" for name in ("cuda", "xpu", "mps") if _is_there(name))
            raise ProConError(
                f"device_map has {str(device)!r}, which is not there: this machine has {there or 'the CPU alone'}"
            )


def _is_there(kind: str) -> bool:
    if kind == "mps":
        return torch.backends.mps.is_available()
    return torch.cuda.is_available() if kind == "cuda" else torch.xpu.is_available()


def _count(kind: str) -> int:
    return {"cuda": torch.cuda.device_count, "xpu": torch.xpu.device_count}.get(kind, lambda: 1)()


def spread(model: nn.Module) -> list[str]:
    """The devices that a device map spreads ``model`` over, in its order; none if it lies on one alone."""
    devices: Mapping[str, Any] = getattr(model, "hf_device_map", None) or {}
    found = list(dict.fromkeys(str(device) for device in devices.values()))
    return found if len(found) > 1 or "disk" in found else []


def input_device(embedding: nn.Module) -> torch.device:
    """The device that inputs of a model go to whose token embedding this is."""
    weight: Any = embedding.weight
    hook: Any = getattr(embedding, "_hf_hook", None)  # put there by Accelerate
    return torch.device(hook.execution_device) if weight.is_meta and hook is not None else weight.device


def offloaded(model: nn.Module, name: str) -> Tensor:
    """A parameter or buffer of ``model`` that a device map has put on no device, in memory."""
    owner, _, own = name.rpartition(".")
    module = model.get_submodule(owner)
    with align_module_device(module, torch.device("cpu")):
        return getattr(module, own).detach().clone()
