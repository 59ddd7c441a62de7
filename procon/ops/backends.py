"""Which backend runs an op: the Triton kernels or plain PyTorch."""

import warnings
from functools import cache
from importlib.util import find_spec

from procon.errors import ProConError
from procon.settings import CHOICES, backend_variable, check_choice


def choose_backend(backend: str, device: str) -> str:
    """``"triton"`` or ``"eager"`` for tensors on this type of device."""
    check_choice("backend", backend, CHOICES["backend"])
    if backend == "auto":
        backend = backend_variable()
    if backend == "auto":
        if device != "cuda":
            return "eager"
        if not _triton_installed():
            _warn_that_triton_is_missing()
            return "eager"
        return "triton"
    if backend == "triton":
        _require_triton(device)
    return backend


# The mark that torch.compiler.assume_constant_result sets. That function first imports torch._dynamo, and so Triton,
# which would take most of a second from everyone who imports the op.
choose_backend._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]  # a mark that torch reads


@cache
def _triton_installed() -> bool:
    return find_spec("triton") is not None


@cache
def _warn_that_triton_is_missing() -> None:
    warnings.warn("Triton is not installed: a slower PyTorch path is used (pip install triton)", stacklevel=2)


def _require_triton(device: str) -> None:
    if not _triton_installed():
        raise ProConError("backend is 'triton' but Triton is not installed: pip install triton, or backend='eager'")
    if device != "cuda":
        from triton import knobs

        if not knobs.runtime.interpret:
            raise ProConError(
                f"backend is 'triton' but hidden is on {device}: move it to a GPU, use backend='eager',"
                " or set TRITON_INTERPRET=1 before Triton is imported"
            )
