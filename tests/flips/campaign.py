"""Damage every file that the library writes, a bit at a time, and count what comes of it."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from damage import OUTCOMES, TRACEBACK, WRONG, Damaged, cuts, flips, outcome
from subjects import AnchorsFolder, Checkpoints, Subject, directions_subject, swaps

#: Bits per region of a file, and cuts per file.
FLIPS, CUTS = 400, 30

Row = dict[str, str | int]


def run(flips_per_region: int = FLIPS, cuts_per_file: int = CUTS, show: Callable[[str], None] = print) -> list[Row]:
    """A row per file, use and region: how often which outcome."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for subject in _subjects(folder):
            for region, tries in _tries(subject, flips_per_region, cuts_per_file):
                rows.append(_row(subject, region, tries, show))
                show(_text(rows[-1]))
        swapped = Counter(outcome(use, expected) for _, use, expected in swaps(folder / "swaps"))
        rows.append({"file": "files of another model", "used": "all", "damage": "swapped", **_counts(swapped)})
        show(_text(rows[-1]))
    return rows


def failures(rows: list[Row]) -> list[Row]:
    """Those of which something came that must not."""
    return [row for row in rows if row[WRONG] or row[TRACEBACK]]


def _subjects(folder: Path) -> Iterator[Subject]:
    (folder / "alone").mkdir()
    yield from AnchorsFolder(folder / "anchors").subjects()
    yield directions_subject(folder / "alone")
    yield from Checkpoints(folder / "checkpoints").subjects()


def _tries(subject: Subject, count: int, cut: int) -> Iterator[tuple[str, Iterator[tuple[str, bytes]]]]:
    data = subject.file.read_bytes()
    for region, (start, stop) in subject.regions.items():
        yield f"bit of {region}", flips(data, start, stop, count, f"{subject.name} {region} {subject.way}")
    yield "cut or lengthened", cuts(data, cut, subject.name)


def _row(subject: Subject, damage: str, tries: Iterator[tuple[str, bytes]], show: Callable[[str], None]) -> Row:
    expected, instead = subject.use(), subject.instead() if subject.instead else None
    damaged = Damaged(subject.file)
    counts = Counter()
    for what, content in tries:
        with damaged(content):
            found = outcome(subject.use, expected, instead)
        counts[found] += 1
        if found in (WRONG, TRACEBACK):
            show(f"{found.upper()}: {subject.name}, {subject.way}, {damage}: {what}")
    return {"file": subject.name, "used": subject.way, "damage": damage, **_counts(counts)}


def _counts(counts: Counter) -> dict[str, int]:
    return {"tried": counts.total(), **{name: counts[name] for name in OUTCOMES}}


def _text(row: Row) -> str:
    return ", ".join(f"{value} {name}" if isinstance(value, int) else str(value) for name, value in row.items())
