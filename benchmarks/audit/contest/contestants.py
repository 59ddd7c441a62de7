"""Who takes part: each call with the launches that it makes for a GPU, as its own launcher chooses them."""

from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.audit.builds import Launch, recorded
from benchmarks.audit.calls import calls
from benchmarks.audit.contest.pretended import pretended

#: Of our calls, those of the contest, without and with directions.
PLAIN = ("norm forward", "norm backward", "norm backward, weight frozen")
CONSTRAINED = (
    "fused forward",
    "fused backward",
    "fused backward, weight frozen",
    "pass-through forward",
    "pass-through backward",
)
DIRECTIONS = (1, 4, 8)

#: Operators of PyTorch that run a kernel where launchers call them: the others allocate, look, or ask.
_KERNELS = (
    "sum",
    "_to_copy",
    "copy_",
    "zero_",
    "zeros",
    "zeros_like",
    "new_zeros",
    "fill_",
    "add",
    "add_",
    "mul",
    "clone",
)


class Contestant(NamedTuple):
    """``launches``: each as its author would try it, the fastest of which counts.

    ``others``: PyTorch's operators among the launches, a kernel each.
    """

    who: str
    call: str
    directions: int
    launches: list[list[Launch]]
    others: list[str]


class _Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in _KERNELS:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def ours(target: str, size: int, rows: int, wanted: str) -> Iterator[Contestant]:
    """``wanted``: what the names of calls begin with."""
    for directions in DIRECTIONS:
        with pretended(target):
            named = calls(rows, size, directions, torch.bfloat16)
            for call in (*(PLAIN if directions == DIRECTIONS[0] else ()), *CONSTRAINED):
                if call.startswith(wanted):
                    yield _launched("ours", call, 0 if call in PLAIN else directions, named[call].run)


def liger(target: str, size: int, rows: int, wanted: str) -> Iterator[Contestant]:
    """Liger's norm: the kernel of one row a program, or of 16 rows for short ones, as its launcher decides."""
    from liger_kernel.ops.rms_norm import rms_norm_backward, rms_norm_forward

    with pretended(target):
        hidden, incoming = (torch.empty(rows, size, dtype=torch.bfloat16) for _ in range(2))
        weight = torch.empty(size, dtype=torch.bfloat16)
        saved = {}

        def forward() -> None:
            _, _, saved["rstd"], *saved["settings"] = rms_norm_forward(hidden, weight, 1e-6, 0.0, "llama", None)

        def backward(needs_weight: bool) -> None:
            block, warps, casting = saved["settings"]
            # In place, its default: a gradient that is written elsewhere is filled with zeros before.
            rms_norm_backward(
                incoming, hidden, weight, saved["rstd"], 0.0, casting, block, warps, True, None, needs_weight
            )

        runs = (forward, lambda: backward(True), lambda: backward(False))
        for call, run in zip(PLAIN, runs, strict=True):
            found = _launched("Liger", call, 0, run)  # the forward decides for the backward
            if call.startswith(wanted):
                yield found


def _launched(who: str, call: str, directions: int, run: Callable[[], object]) -> Contestant:
    with recorded() as launches, _Operators() as operators:
        run()
    return Contestant(who, call, directions, [[launch] for launch in launches], operators.names)


def compiled(target: str, size: int, rows: int, wanted: str) -> Iterator[Contestant]:
    """What ``torch.compile`` makes of the norm, and of the norm with the squared penalty, the least work."""
    from benchmarks.audit.contest.inductor import generated, traced

    for directions in (0, *DIRECTIONS):
        kind = "fused" if directions else "norm"
        for frozen in (False, True):
            calls = {way: f"{kind} {way}" + (", weight frozen" if frozen else "") for way in ("forward", "backward")}
            if frozen:
                del calls["forward"]  # the same
            calls = {way: call for way, call in calls.items() if call.startswith(wanted)}
            if not calls:
                continue
            graphs = traced(_norm_with_penalty(directions), lambda k=directions, f=frozen: _inputs(rows, size, k, f))
            for way, call in calls.items():
                with TemporaryDirectory() as folder:
                    run = generated(graphs[way], target, Path(folder), backward=way == "backward")
                    with _Operators() as operators:
                        launches = run()
                    yield Contestant("torch.compile", call, directions, launches, operators.names)


def _norm_with_penalty(directions: int) -> Callable[..., tuple[Tensor, ...]]:
    def run(hidden: Tensor, weight: Tensor, direction: Tensor, anchor: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
        h = hidden.float()
        normed = (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6)).to(hidden.dtype) * weight
        if not directions:
            return (normed,)
        # Not a product of matrices, which would be a kernel of its own.
        errors = [(h * direction[k]).sum(-1) - anchor[:, k] for k in range(directions)]
        return normed, tokens * torch.stack([e.square() for e in errors]).sum(0)

    return run


def _inputs(rows: int, size: int, directions: int, frozen: bool) -> list[Tensor]:
    return [
        torch.empty(rows, size, dtype=torch.bfloat16, requires_grad=True),
        torch.empty(size, dtype=torch.bfloat16, requires_grad=not frozen),
        torch.empty(directions, size),
        torch.empty(rows, directions),
        torch.empty(rows),
    ]
