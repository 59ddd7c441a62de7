"""What the benchmarks run on, and how large they are."""

import ctypes
import os
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

import torch

from benchmarks.harness.timers import gpu_time, wall_time

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

#: "full", or "smoke": sizes that only show that everything runs.
SIZE = os.environ.get("PROCON_BENCHMARK_SIZE", "full")
if SIZE not in ("full", "smoke"):
    raise SystemExit(f"PROCON_BENCHMARK_SIZE is {SIZE!r}: give 'full' or 'smoke'")
SMOKE = SIZE == "smoke"

#: What torch.compile is tried on: "none", "kernels" or "models". Inductor takes minutes for a model on a CPU.
COMPILED = os.environ.get("PROCON_BENCHMARK_COMPILE", "none" if SMOKE else "models" if DEVICE == "cuda" else "kernels")
if COMPILED not in ("none", "kernels", "models"):
    raise SystemExit(f"PROCON_BENCHMARK_COMPILE is {COMPILED!r}: give 'none', 'kernels' or 'models'")

#: Pairs of training steps that a ratio is taken from.
PAIRS = int(os.environ.get("PROCON_BENCHMARK_PAIRS", "4" if SMOKE else "15"))

_LEVEL_3 = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
_PACKAGES = (
    *("torch", "triton", "transformers", "peft", "flash-attn", "pytest-benchmark"),
    *("liger-kernel", "quack-kernels", "nvidia-cudnn-frontend", "nvidia-cutlass-dsl"),
)
#: What the NVIDIA driver says of a card, by the name that it has there.
_CARD = {
    "driver": "driver_version",
    "power limit": "power.limit",
    "highest clock of multiprocessors": "clocks.max.sm",
    "highest clock of memory": "clocks.max.memory",
}


def keep_freed_memory() -> bool:
    """Let glibc keep the memory that is freed, if it is the C library; True if it does.

    By default it hands large blocks back to the system and takes them again page by page. On a CPU that takes a
    tenth of a training step, varies, and is not what is measured here.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    most_mapped, trim_threshold = -4, -1  # M_MMAP_MAX, M_TRIM_THRESHOLD in malloc.h
    return bool(mallopt and mallopt(most_mapped, 0) and mallopt(trim_threshold, -1))


def installed(package: str) -> str | None:
    """The version of an installed distribution."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def describe() -> dict[str, object]:
    """Card or processor, and versions."""
    return {
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "last_level_cache": last_level_cache(),
        "card": _card() if DEVICE == "cuda" else {},
        "versions": {"python": platform.python_version()} | {p: v for p in _PACKAGES if (v := installed(p))},
    }


def _card() -> dict[str, str]:
    properties = torch.cuda.get_device_properties(0)
    card = {
        "memory": f"{properties.total_memory / 2**30:.0f} GiB",
        "multiprocessors": str(properties.multi_processor_count),
        "CUDA" if torch.version.cuda else "ROCm": torch.version.cuda or torch.version.hip,
    }
    query = ["nvidia-smi", f"--id=GPU-{properties.uuid}", f"--query-gpu={','.join(_CARD.values())}"]
    try:
        found = subprocess.run(
            [*query, "--format=csv,noheader"], capture_output=True, text=True, check=True, timeout=20
        )
    except (OSError, subprocess.SubprocessError):  # a card of another make, or a machine without the driver's tools
        return card
    return card | dict(zip(_CARD, map(str.strip, found.stdout.split(",")), strict=False))


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


@cache
def last_level_cache() -> int:
    """Bytes; 64 MiB if the system does not report it."""
    if DEVICE == "cuda":
        return torch.cuda.get_device_properties(0).L2_cache_size
    try:
        return int(_LEVEL_3.read_text().strip().removesuffix("K")) << 10
    except (OSError, ValueError):
        return 64 << 20


@cache
def copy_bandwidth() -> float:
    """Bytes per second, read and written, of a copy far larger than the last-level cache."""
    size = (2 if SMOKE else 16) * last_level_cache()
    source = torch.randint(0, 127, (size,), dtype=torch.int8, device=DEVICE)
    target = torch.empty_like(source)
    target.copy_(source)
    timer = gpu_time if DEVICE == "cuda" else wall_time
    return 2 * size / median(timer(lambda: target.copy_(source), 1) for _ in range(9))
