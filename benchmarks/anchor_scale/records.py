"""What was measured, and on what."""

from __future__ import annotations

import os
from importlib.metadata import version
from typing import Any

from benchmarks.study.record import provenance


def made() -> dict[str, Any]:
    """Date, machine, versions and commit."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {**provenance(), "memory_bytes": memory, **{name: version(name) for name in ("numpy", "safetensors", "xxhash")}}
