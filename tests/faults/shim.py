"""Counts a process's calls that change files below a folder, and makes one of them fail or be its last: see shim.c."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).with_name("shim.c")

#: What is done to the call, as shim.c counts it, and the error that it ends with.
ACTIONS = {
    "none": (0, 0),
    "kill": (1, 0),
    "half": (2, 0),
    "ENOSPC": (3, errno.ENOSPC),
    "EIO": (3, errno.EIO),
    "full": (4, errno.ENOSPC),
}


def missing() -> str | None:
    """Why there can be no shim on this machine; None if there can."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"the shim is for Linux on x86_64, not for {sys.platform} on {platform.machine()}"
    return None if shutil.which("cc") else "the shim needs a C compiler named cc"


@cache
def _library() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "shim.so"
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", str(built), str(SOURCE)], check=True)
        library = ctypes.CDLL(str(built))
    library.shim_disarm.restype = ctypes.c_long
    return library


def build() -> None:
    """Compile and load it, for the processes that are forked from this one."""
    _library()


def arm(root: Path, *, n: int = 0, action: str = "none", journal: Path | None = None, rank: int = 0) -> None:
    """From now on until this process ends; ``n`` counts from 1."""
    what, code = ACTIONS[action]
    record = None if journal is None else os.fsencode(journal)
    result = _library().shim_arm(os.fsencode(root.resolve()), record, rank, ctypes.c_long(n), what, code)
    if result:
        raise OSError(-result, f"the shim cannot be armed: {os.strerror(-result)}")


def disarm() -> int:
    """How many calls there were."""
    return _library().shim_disarm()
