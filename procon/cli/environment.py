"""``procon env``: what a bug report needs to say about the machine and the versions."""

from __future__ import annotations

import json
import os
import platform
import warnings
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from procon.cli.arguments import EnvArguments
from procon.errors import ProConError, visible
from procon.models import best_attention, default_dtype
from procon.ops.backends import choose_backend
from procon.settings import BACKEND_VARIABLE, CHOICES
from procon.version import __version__

#: What ProCon runs on, then what it works with; by the names that pip has for them.
_PACKAGES = (
    *("torch", "transformers", "accelerate", "peft", "datasets", "huggingface_hub", "tokenizers", "safetensors"),
    *("numpy", "triton", "trl", "axolotl", "llamafactory", "unsloth", "lightning", "deepspeed", "bitsandbytes"),
    *("liger-kernel", "flash-attn", "flash-attn-3", "flash-attn-4", "kernels", "vllm", "gguf"),
    *("tensorboard", "wandb", "matplotlib", "rich", "shtab"),
)

#: What ProCon reads, and what changes how the libraries below it run.
VARIABLES = (
    *(BACKEND_VARIABLE, "PROCON_CACHE", "XDG_CACHE_HOME", "LOCAL_RANK"),
    *("TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "HF_HOME", "HF_ENDPOINT", "HF_HUB_OFFLINE"),
)


def environment(arguments: EnvArguments) -> None:
    """``procon env``"""
    facts = describe_environment()
    print(json.dumps(facts, indent=1) if arguments.json else _markdown(facts))


def describe_environment() -> dict[str, Any]:
    """Versions, devices, what ``auto`` means here, and environment variables; None for what is not there."""
    return {
        "procon": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "devices": _devices(),
        "auto": {"dtype": _name(default_dtype()), "backend": _backend(), "attention": _attention()},
        "variables": {name: os.environ.get(name) for name in VARIABLES},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _devices() -> list[str]:
    found = [f"CPU {platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"]
    kind = "ROCm" if torch.version.hip else "CUDA"
    for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        facts = torch.cuda.get_device_properties(number)
        found.append(
            f"{kind} {number}: {facts.name}, capability {facts.major}.{facts.minor}, "
            f"{facts.total_memory / 2**30:.0f} GiB ({kind} {torch.version.hip or torch.version.cuda})"
        )
    if torch.backends.mps.is_available():
        found.append("MPS")
    if torch.xpu.is_available():
        found += [f"XPU {number}: {torch.xpu.get_device_name(number)}" for number in range(torch.xpu.device_count())]
    return found


def _backend() -> str:
    """What ``auto`` means for the op, and why."""
    asked = os.environ.get(BACKEND_VARIABLE, "auto")
    if asked not in CHOICES["backend"]:
        return f"none: {BACKEND_VARIABLE} is {asked!r}, which is not one of {', '.join(CHOICES['backend'])}"
    on_gpu = torch.cuda.is_available()
    try:
        with warnings.catch_warnings(action="ignore"):  # of what is said below
            chosen = choose_backend("auto", "cuda" if on_gpu else "cpu")
    except ProConError as error:
        return f"none: {error}"
    if asked != "auto":
        return f"{chosen}: {BACKEND_VARIABLE} says so"
    if chosen == "triton":
        return "triton: there is a GPU, and Triton is installed"
    return "eager: Triton is not installed" if on_gpu else "eager: there is no CUDA or ROCm GPU"


def _attention() -> str:
    """What packed training takes, and why."""
    best = best_attention(default_dtype())
    if best != "sdpa":
        return f"{best}: it is installed, and runs on this GPU"
    if not torch.cuda.is_available():
        return "sdpa: there is no CUDA or ROCm GPU"
    return "sdpa: no FlashAttention is installed that runs on this GPU"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _markdown(facts: dict[str, Any]) -> str:
    """Lines to paste into an issue."""
    packages, auto = facts["packages"], facts["auto"]
    there = ", ".join(f"{name} {number}" for name, number in packages.items() if number)
    missing = ", ".join(name for name, number in packages.items() if not number)
    variables = ", ".join(f"{name}={value}" for name, value in facts["variables"].items() if value is not None)
    lines = {
        "ProCon": facts["procon"],
        "Python": facts["python"],
        "platform": facts["platform"],
        "packages": there,
        "not installed": missing or "none of those that ProCon works with",
        "devices": "; ".join(facts["devices"]),
        "dtype `auto`": auto["dtype"],
        "backend `auto`": auto["backend"],
        "attention for packing": auto["attention"],
        "environment variables": variables or "none of those that ProCon reads",
    }
    return "\n".join(f"- {name}: {visible(text)}" for name, text in lines.items())
