"""A pytest plugin: a GPU that ttsem plays on the CPU, for tests marked ``gpu``.

Within it ``device="cuda"`` is the CPU. For each launch Triton compiles the kernel for sm_90, and ttsem runs the IR that
it made of it (TTIR). An access out of bounds, a race between programs, an undefined value: each fails the test that
launched, also if the code under test catches the fault. So does a launch that is too large to be checked for races.
"""

from __future__ import annotations

import tomllib
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ttsem import memory, sanitize

NOT_RUN = Path(__file__).with_name("not_run.toml")

#: Of the GPU. With few multiprocessors the programs of a small test take several rounds each.
PROPERTIES = SimpleNamespace(
    name="ttsem", major=9, minor=0, multi_processor_count=2, warp_size=32, total_memory=1 << 34
)

_open = ExitStack()
_faults: list[Exception] = []
_gpu: sanitize.Session
_launches = 0


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests() -> None:
    """Before ``tests/conftest.py`` asks whether there is a GPU."""
    global _gpu
    _gpu = _open.enter_context(sanitize.session(PROPERTIES.major * 10 + PROPERTIES.minor, on_stop=_faults.append))
    torch.cuda.get_device_properties = lambda device=None: PROPERTIES
    # A build of torch for GPUs would ask the driver.
    torch.Tensor.pin_memory = lambda tensor, device=None: tensor
    torch.optim.Optimizer._accelerator_graph_capture_health_check = lambda optimizer: None
    memory.Memory.load = _load


def pytest_unconfigure() -> None:
    _open.close()


_loaded = memory.Memory.load


def _load(self, addresses, mask, other, dtype):
    """ttsem's own gives 0 to the lanes that a mask turns off; without ``other`` Triton leaves them undefined."""
    if mask is not None and other is None:
        other = np.frombuffer(b"\xff" * np.dtype(dtype).itemsize, dtype)[0]  # NaN, in each float dtype
    return _loaded(self, addresses, mask, other, dtype)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reasons = tomllib.loads(NOT_RUN.read_text())
    for item in items:
        reason = reasons.get(item.nodeid.split("[")[0])
        if reason:
            item.add_marker(pytest.mark.skip(reason=f"ttsem: {reason}"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call():
    faults, unchecked = len(_faults), _gpu.races_unchecked
    result = yield
    if len(_faults) > faults:
        raise _faults[faults]
    if _gpu.races_unchecked > unchecked:
        pytest.fail("a launch is too large for ttsem to look for races in it: take fewer rows", pytrace=False)
    return result


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["launches"] = _gpu.launches


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node) -> None:
    """A process of pytest-xdist ends."""
    global _launches
    _launches += getattr(node, "workeroutput", {}).get("launches", 0)


def pytest_terminal_summary(terminalreporter) -> None:
    terminalreporter.write_line(f"ttsem ran {_launches + _gpu.launches} launches of kernels on the CPU")
