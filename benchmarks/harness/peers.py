"""RMSNorms of other libraries: how each is called, and why one is left out."""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import NamedTuple

from torch import Tensor

from benchmarks.harness.machine import DEVICE, installed

#: ``norm(hidden, weight, eps)``; differentiable in the first two.
Norm = Callable[[Tensor, Tensor, float], Tensor]


class _Peer(NamedTuple):
    distribution: str
    module: str
    norm: Callable[[ModuleType], Norm]


def _liger(module: ModuleType) -> Norm:
    # Not in place, which is its default: the gradient that arrives is timed again.
    return lambda hidden, weight, eps: module.LigerRMSNormFunction.apply(hidden, weight, eps, 0.0, "llama", False)


#: Written for Liger 0.8.5, quack 0.6.5 and cuDNN's frontend 1.32. Imported from its own file, Liger's Triton norm stays
#: the Triton one, whichever ``liger_kernel.ops`` would choose on the machine.
PEERS = {
    "liger": _Peer("liger-kernel", "liger_kernel.ops.rms_norm", _liger),
    "liger_cute": _Peer("liger-kernel", "liger_kernel.ops.cutedsl.ops.rms_norm", _liger),
    "quack": _Peer(
        "quack-kernels",
        "quack.rmsnorm",
        lambda module: lambda hidden, weight, eps: module.rmsnorm(hidden, weight, eps=eps),
    ),
    "cudnn": _Peer(
        "nvidia-cudnn-frontend",
        "cudnn.ops.norm.rmsnorm",
        lambda module: lambda hidden, weight, eps: module.rms_norm(hidden, weight, eps=eps),
    ),
}


@cache
def why_left_out(name: str) -> str | None:
    """Why a peer cannot be run, if it cannot."""
    peer = PEERS[name]
    if not installed(peer.distribution):
        return f"{peer.distribution} is not installed"
    if DEVICE != "cuda":
        return f"{peer.distribution} needs a GPU"
    try:
        import_module(peer.module)
    # Compilers of their own come with them, which fail in ways of their own.
    except Exception as error:
        return f"{peer.module} of {peer.distribution} cannot be imported: {first_line(error)}"
    return None


def norm_of(name: str) -> Norm:
    """The norm of a peer that is not left out."""
    return PEERS[name].norm(import_module(PEERS[name].module))


def first_line(error: BaseException) -> str:
    """Kind and first line of an error."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
