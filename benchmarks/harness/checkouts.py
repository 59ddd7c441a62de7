"""The library as of a commit, to be imported by a process of its own beside the benchmarks of this tree."""

import os
import subprocess
from contextlib import ExitStack
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def checked_out(commit: str, folder: Path, stack: ExitStack) -> Path:
    """A folder for ``PYTHONPATH``, below the empty ``folder``; the checkout is removed when ``stack`` is closed."""
    checkout, path = folder / "checkout", folder / "path"
    subprocess.run(["git", "worktree", "add", "--detach", "--quiet", checkout, commit], cwd=ROOT, check=True)
    stack.callback(subprocess.run, ["git", "worktree", "remove", "--force", checkout], cwd=ROOT, check=True)
    path.mkdir()
    (path / "procon").symlink_to(checkout / "procon")
    # The same measurement of every commit.
    (path / "benchmarks").symlink_to(ROOT / "benchmarks")
    return path


def environment(commit: str, folder: Path, stack: ExitStack) -> dict[str, str]:
    """Of a process on one core that imports the library as of ``commit``; the rest is as for :func:`checked_out`."""
    path = checked_out(commit, folder, stack)
    return os.environ | {"PYTHONPATH": str(path), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
