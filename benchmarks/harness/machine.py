"""What the benchmarks run on, and how large they are."""

import ctypes
import os
import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

import torch

from benchmarks.harness.timers import wall_time

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
_PACKAGES = ("torch", "triton", "transformers", "peft", "liger-kernel", "flash-attn", "pytest-benchmark")


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


def why_no_liger() -> str | None:
    """Why Liger's kernels cannot be run, if they cannot."""
    if not installed("liger-kernel"):
        return "liger-kernel is not installed"
    return None if DEVICE == "cuda" else "liger-kernel needs a GPU"


def describe() -> dict[str, object]:
    """Card or processor, and versions."""
    return {
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "last_level_cache": last_level_cache(),
        "versions": {"python": platform.python_version()} | {p: v for p in _PACKAGES if (v := installed(p))},
    }


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
    return 2 * size / median(wall_time(lambda: target.copy_(source), 1) for _ in range(9))
