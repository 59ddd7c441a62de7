"""``procon train --num_processes``: the same command in several processes, one for each device."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from procon.cli.arguments import TrainArguments
from procon.errors import ProConError

#: Tells a process that it was started here.
_STARTED = "PROCON_STARTED"

_CONFIGS = files("procon.cli") / "accelerate_configs"

#: What Accelerate calls set-ups that keep a model in parts.
_SHARDED = ("FSDP", "DEEPSPEED")


def is_started() -> bool:
    """Whether this process is one of several, from here or from another launcher."""
    return _STARTED in os.environ or "LOCAL_RANK" in os.environ


def asks_for_processes(arguments: TrainArguments) -> bool:
    """Whether the settings are of several processes, and this one is yet to start them.

    Raises:
        ProConError: if there is no such configuration.
    """
    config = arguments.accelerate_config
    if config is not None:
        _config_file(config)
    return not is_started() and ((arguments.num_processes or 1) > 1 or config not in (None, "ddp"))


def launch(arguments: TrainArguments, argv: Sequence[str], *, use_cpu: bool) -> int:
    """Run ``procon train`` with ``argv`` in processes of its own, and wait for them; returns the exit code.

    On GPUs and XPUs by ``accelerate launch``, on a CPU by ``torchrun`` over gloo.

    Raises:
        ProConError: if the machine has not what the settings ask for.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from accelerate.utils import patch_environment
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    config = _config_file(arguments.accelerate_config or "ddp")
    devices = 0 if use_cpu else _devices()
    processes = _processes(arguments, config, devices)
    environment = {_STARTED: "1", **_same_path()}
    for name in ("torch.distributed.run", "torch.distributed.elastic"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # the processes themselves say what is wrong
    if not devices:
        environment.setdefault("ACCELERATE_USE_CPU", "true")
        if "OMP_NUM_THREADS" not in os.environ:
            environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // processes))
    program = ["-m", "procon.cli", "train", *argv]
    with patch_environment(**environment):
        try:
            if devices:
                own = [f"--config_file={config}", f"--num_processes={processes}"]
                launch_command(launch_command_parser().parse_args([*own, *program]))
            else:
                torchrun.main(["--standalone", f"--nproc-per-node={processes}", *program])
        except ChildFailedError as error:
            return error.get_first_failure()[1].exitcode
        except SignalException:
            raise KeyboardInterrupt from None
    return 0


def _config_file(name: str) -> Path:
    """A file of one's own, or one of those that come with the package."""
    own, ours = Path(name), Path(str(_CONFIGS / f"{name}.yaml"))
    for path in (own, ours):
        if os.path.isfile(path):
            return path
    known = ", ".join(sorted(path.name.removesuffix(".yaml") for path in _CONFIGS.iterdir()))
    raise ProConError(f"accelerate_config is {name!r:.80}: choose one of {known}, or give a file of accelerate config")


def _devices() -> int:
    """How many GPUs or XPUs there are."""
    import torch

    return torch.cuda.device_count() or (torch.xpu.device_count() if torch.xpu.is_available() else 0)


def _processes(arguments: TrainArguments, config: Path, devices: int) -> int:
    try:
        settings: Any = yaml.safe_load(config.read_text(encoding="utf-8")) or {}
        kind, own = settings.get("distributed_type"), settings.get("num_processes")
    except Exception as error:  # PyYAML has errors of its own, and lets through those of Python's types
        raise ProConError(f"accelerate_config {str(config)!r} cannot be read ({error}): check the file") from error
    if own is not None and (type(own) is not int or own < 1):
        raise ProConError(
            f"accelerate_config {str(config)!r} gives num_processes {own!r:.40}: give a whole number, 1 or more"
        )
    if not devices and kind in _SHARDED:
        raise ProConError(
            f"accelerate_config is {arguments.accelerate_config!r}, which keeps a model in parts over GPUs, and there "
            "is none: take ddp"
        )
    processes = arguments.num_processes or own or devices
    if not processes:
        raise ProConError("there is no GPU, so it is not known how many processes to start: give --num_processes")
    if devices and processes > devices:
        raise ProConError(f"num_processes is {processes}, and this machine has {devices} GPUs: give {devices} or less")
    return processes


def _same_path() -> dict[str, str]:
    """Processes find what this one finds: no module of the current folder, unless it is searched here as well."""
    return {} if sys.path[:1] in ([""], [os.getcwd()]) else {"PYTHONSAFEPATH": "1"}
