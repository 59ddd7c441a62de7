"""What benchmarks/gpu.sh left in its folder, and what is missing there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

from benchmarks.gpu_page.measured import Group, timings

#: Parts of the script in its order, and what each is on the page.
PARTS = {
    "tests": "tests marked gpu",
    "clone": "clone",
    "rms_norm_penalty": "norms",
    "projection_penalty": "the op",
    "training_step_7b": "training step, 7B",
    "tune": "tuning",
    "host_overhead": "host overhead",
    "sanitizer": "compute-sanitizer",
    "training_step": "training steps, other models",
    "training_step_compiled": "training step, compiled model",
    "anchors": "anchors",
    "anchor_sources": "sources of anchors",
}


class Case(NamedTuple):
    """A test of pytest: "passed", "failed" or "skipped", and the first line of the reason."""

    name: str
    outcome: str
    reason: str


@dataclass(frozen=True)
class Part:
    """A part of the script.

    Attributes:
        record: how it ended, as the script wrote it; empty if it was not asked for.
        results: of pytest-benchmark, or of tuning; empty if there are none.
        cases: of pytest.
        last_line: of the log.
    """

    name: str
    record: dict[str, Any]
    results: dict[str, Any]
    cases: list[Case]
    last_line: str

    @property
    def groups(self) -> dict[str, Group]:
        return timings(self.results)

    @property
    def machine(self) -> dict[str, Any]:
        return self.results.get("machine") or self.results.get("machine_info", {}).get("procon", {})

    @property
    def trouble(self) -> str:
        """Why it is not whole; empty if it is."""
        if not self.record:
            return "not run"
        if self.record["why"] or self.record["status"] == 0:
            return self.record["why"]
        count = sum(case.outcome == "failed" for case in self.cases)
        return f"{count} failed" if count else f"ended with status {self.record['status']}: {self.last_line}"


@dataclass(frozen=True)
class Folder:
    """All parts, and the machine that they ran on."""

    parts: dict[str, Part]
    machine: dict[str, Any]

    def groups(self, part: str) -> dict[str, Group]:
        return self.parts[part].groups

    @property
    def card(self) -> dict[str, str]:
        """What is known of the GPU; empty if the results are not from one."""
        return self.machine.get("card", {})

    @property
    def smoke(self) -> bool:
        """Whether sizes only show that everything runs."""
        return any(part.results.get("run", {}).get("size") == "smoke" for part in self.parts.values())

    @property
    def commits(self) -> list[str]:
        """Of all results, ten characters of each."""
        found = [part.results["commit_info"] for part in self.parts.values() if "commit_info" in part.results]
        return list(dict.fromkeys(f"{c['id'][:10]}{' with changes' if c.get('dirty') else ''}" for c in found))

    @property
    def dates(self) -> list[str]:
        return sorted({part.results["datetime"][:10] for part in self.parts.values() if "datetime" in part.results})


def read_folder(folder: Path) -> Folder:
    """Read what is there.

    Raises:
        ValueError: if nothing is there, or results are from several machines, which are not to be compared.
    """
    parts = {name: _read_part(folder, name) for name in PARTS}
    if not any(part.record for part in parts.values()):
        raise ValueError(f"{folder} has no results of benchmarks/gpu.sh")
    devices: dict[str, list[str]] = {}
    for part in parts.values():
        if part.machine:
            devices.setdefault(part.machine["device"], []).append(part.name)
    if len(devices) > 1:
        several = "; ".join(f"{device}: {', '.join(names)}" for device, names in devices.items())
        raise ValueError(f"{folder} has results of several machines ({several}): give each a folder of its own")
    return Folder(parts, next((part.machine for part in parts.values() if part.machine), {}))


def _read_part(folder: Path, name: str) -> Part:
    record, results = (_read_json(folder / f"{name}{ending}") for ending in (".part.json", ".json"))
    return Part(name, record, results, list(_read_cases(folder / f"{name}.xml")), _last_line(folder / f"{name}.log"))


def _read_json(file: Path) -> dict[str, Any]:
    """Empty if there is none, or if its writing was cut short."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}


def _last_line(file: Path) -> str:
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        return ""
    # compute-sanitizer begins its lines with equals signs, pytest has them on both sides.
    return next((line.strip("= ") for line in reversed(lines) if line.strip("= ")), "")


def _read_cases(file: Path) -> Iterator[Case]:
    try:
        root = ElementTree.parse(file).getroot()  # noqa: S314, as pytest wrote it
    except (FileNotFoundError, ElementTree.ParseError):
        return
    for case in root.iter("testcase"):
        name = f"{case.get('classname', '')}::{case.get('name', '')}".removeprefix("::")
        outcome, reason = "passed", ""
        for element in case:
            if element.tag in ("failure", "error", "skipped"):
                outcome = "skipped" if element.tag == "skipped" else "failed"
                reason = _reason(element)
        yield Case(name, outcome, reason)


def _reason(element: ElementTree.Element) -> str:
    """One line. What cannot be collected has it at the end, below its traceback."""
    message, text = element.get("message", ""), (element.text or "").strip()
    if message == "collection failure" and text:
        message = text.splitlines()[-1]
    return message.strip().partition("\n")[0].removeprefix("E ").strip()
