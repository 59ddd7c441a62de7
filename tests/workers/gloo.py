"""Ranks on a CPU that Accelerate shards a model over, as it does on GPUs."""

import os
from importlib.util import find_spec

import torch.distributed
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

_AS_LAUNCHED = dict(os.environ)


def start(*, sharding: bool) -> None:
    """Begin again with the launched processes as ranks of gloo, whatever was set up before.

    Args:
        sharding: say that the ranks are accelerators. Accelerate shards over no others, and leaves CPUs to DDP.
    """
    # Training arguments leave plugins' settings there.
    os.environ.clear()
    os.environ.update(_AS_LAUNCHED)
    AcceleratorState._reset_state(reset_partial_state=True)
    if find_spec("deepspeed"):
        import deepspeed

        # Ranks on one CPU would first compile a way to share memory.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if "RANK" not in os.environ:
        return
    state = PartialState(cpu=True, backend="gloo")
    if sharding:
        state.distributed_type = DistributedType.MULTI_NPU


def stop() -> None:
    """End the group, once every rank has come here.

    A rank that leaves while gloo's threads still run may be aborted at exit ("terminate called without an active
    exception"), and takes a run that was done down with it.
    """
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
