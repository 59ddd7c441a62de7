"""Tests in a fork of a process that has imported torch and its kin, so that no mutant has to import them."""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import select
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path
from typing import Any

import coverage
import pytest

_PYTEST = ["-q", "--no-header", "--no-summary", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:benchmark"]


def in_child(work: Callable[[], Any], seconds: float) -> Any:
    """What ``work`` returns, as JSON has it, from a fork of this process; None if it takes longer, or dies."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.setsid()
        os.close(reading)
        nothing = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(nothing, stream)
        answer = b"null"
        with contextlib.suppress(BaseException):
            answer = json.dumps(work()).encode()
        with os.fdopen(writing, "wb") as pipe:
            pipe.write(answer)
        os._exit(0)
    os.close(writing)
    end, answer = time.monotonic() + seconds, b""
    with os.fdopen(reading, "rb", buffering=0) as pipe:
        while (left := end - time.monotonic()) > 0 and select.select([pipe], [], [], left)[0]:
            part = pipe.read(1 << 20)
            if not part:
                break
            answer += part
        else:
            answer = b"null"
    # Also what the tests have started.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return json.loads(answer or b"null")


def warm_up(modules: Iterable[str]) -> None:
    for module in modules:
        with contextlib.suppress(Exception):
            importlib.import_module(module)
    gc.collect()
    gc.freeze()


class _Mutated(SourceFileLoader):
    def __init__(self, name: str, file: Path, source: str) -> None:
        super().__init__(name, str(file))
        self._source = source

    def get_code(self, fullname: str) -> Any:
        return compile(self._source, self.path, "exec", dont_inherit=True)


class _Finder:
    def __init__(self, name: str, file: Path, source: str) -> None:
        self._spec = name, file, source

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != self._spec[0]:
            return None
        return spec_from_file_location(name, self._spec[1], loader=_Mutated(*self._spec))


class _FirstFailure:
    def __init__(self) -> None:
        self.test = ""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and not self.test:
            self.test = report.nodeid


def killer(root: Path, file: str, source: str, tests: list[str], folder: Path) -> str:
    """The first test that fails under ``source`` in the place of ``file``; "" if none does."""
    name = file.removesuffix(".py").replace("/", ".")
    sys.meta_path.insert(0, _Finder(name, root / file, source))
    watch = _FirstFailure()
    status = pytest.main([*_PYTEST, "-x", f"--rootdir={root}", f"--basetemp={folder}", *tests], plugins=[watch])
    return "" if status == pytest.ExitCode.OK else watch.test or "import"


class _Timed:
    """Coverage by test, and how long each passing one takes."""

    def __init__(self, measured: coverage.Coverage) -> None:
        self._coverage, self.seconds, self.failed = measured, defaultdict(float), set()

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._coverage.switch_context(nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] += report.duration
        if not report.passed:
            self.failed.add(report.nodeid)


def baseline(root: Path, files: list[str], tests: list[str], folder: Path) -> dict[str, Any]:
    """What the tests do on the files as they are.

    ``tests``: seconds of each that passes; ``skipped``: those that do not; ``lines``: per file and line, the tests that
    run it; ``branches``: per file, how many were taken and how many there are; ``modules``: those of others.
    """
    measured = coverage.Coverage(
        data_file=None, branch=True, include=[str(root / file) for file in files], config_file=False
    )
    measured.start()
    timed = _Timed(measured)
    pytest.main([*_PYTEST, f"--rootdir={root}", f"--basetemp={folder}", *tests], plugins=[timed])
    measured.stop()
    report = folder / "coverage.json"
    measured.json_report([str(root / file) for file in files], outfile=str(report))  # those that no test runs, too
    found = {os.path.realpath(file): each["summary"] for file, each in json.loads(report.read_text())["files"].items()}
    branches = {file: [found[str(root / file)][n] for n in ("covered_branches", "num_branches")] for file in files}
    data, lines = measured.get_data(), {}
    for file in files:
        by_line = data.contexts_by_lineno(str(root / file))
        lines[file] = {
            line: [test for test in run_by if test and test not in timed.failed] for line, run_by in by_line.items()
        }
    return {
        "tests": {test: round(seconds, 4) for test, seconds in timed.seconds.items() if test not in timed.failed},
        "skipped": sorted(timed.failed),
        "lines": lines,
        "branches": branches,
        "modules": sorted(name for name in sys.modules if _is_of_others(name, root)),
    }


def _is_of_others(name: str, root: Path) -> bool:
    """Whether a module is neither mutated nor one of the tests: it may be imported once for all."""
    origin = getattr(getattr(sys.modules[name], "__spec__", None), "origin", None) or ""
    return "site-packages" in origin or (os.path.isabs(origin) and root not in Path(origin).resolve().parents)
