"""Processes of Python that import nothing: each is forked from one that has imported what they need.

Runs that are killed, and ranks, take processes of their own. Importing PyTorch, Transformers and TRL is most of what
such a process does, so one does it for all that a session of tests starts.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
from pathlib import Path
from unittest import mock

_CONTEXT = multiprocessing.get_context("forkserver")
# DeepSpeed, where it is installed, is what every Trainer imports.
_CONTEXT.set_forkserver_preload(
    [
        "procon.cli.train",
        "procon.training.sft",
        "transformers.models.llama.modeling_llama",
        "torch.distributed.fsdp",
        "deepspeed",
    ]
)

#: As the session began: tests leave settings in the environment.
_BEGAN = dict(os.environ)

#: One thread, as a process that forks may have no others; and no GPU, as ranks here share a CPU.
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}


class Python:
    """``python ARGUMENTS`` in a process of its own, which is started here.

    Args:
        arguments: a script's path, ``-m`` and a module, or ``-c`` and a program; and what it is given.
        environment: variables in addition to those that the session began with.
    """

    def __init__(self, *arguments: str | Path, **environment: str):
        descriptor, name = tempfile.mkstemp(suffix=".log")
        os.close(descriptor)
        self._log = Path(name)
        common = _BEGAN | _ENVIRONMENT
        with mock.patch.dict(os.environ, common, clear=True):  # of the process that forks, if none runs
            self._process = _CONTEXT.Process(target=_run, args=([*map(str, arguments)], common | environment, name))
            self._process.start()

    @property
    def runs(self) -> bool:
        """Whether it has not ended."""
        return self._process.is_alive()

    def kill(self) -> None:
        """End it as SIGKILL does; nothing happens if it has ended."""
        self._process.kill()
        self._process.join()

    def wait(self, code: int = 0, seconds: float = 1200) -> None:
        """Until it ends; an AssertionError has the end of what it wrote, if that is with another exit code."""
        self._process.join(seconds)
        if self.runs:
            self.kill()
        found, written = self._process.exitcode, self._log.read_text(errors="replace")
        self._log.unlink()
        assert found == code, f"exit code {found}\n{written[-4000:]}"


def run_python(*arguments: str | Path, code: int = 0, seconds: float = 1200) -> None:
    """``python ARGUMENTS``, to its end."""
    Python(*arguments).wait(code, seconds)


def run_ranks(ranks: int, *arguments: str | Path, seconds: float = 1200) -> None:
    """``torchrun --nproc-per-node RANKS ARGUMENTS``, to its end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    variables = [{**group, "RANK": rank, "LOCAL_RANK": rank} for rank in range(ranks)]
    running = [Python(*arguments, **{name: str(value) for name, value in each.items()}) for each in variables]
    try:
        for rank in running:
            rank.wait(seconds=seconds)
    finally:
        for rank in running:
            rank.kill()


def _run(arguments: list[str], variables: dict[str, str], log: str) -> None:
    descriptor = os.open(log, os.O_WRONLY)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.clear()
    os.environ.update(variables)
    kind, *rest = arguments
    if kind == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(rest[0], {"__name__": "__main__"})
    else:
        sys.argv = arguments
        runpy.run_path(kind, run_name="__main__")
