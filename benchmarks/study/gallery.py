"""The figures of a page of results: shown in its text, and written to a folder beside it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from benchmarks.study.figures import Drawing
from procon.files import write_text


class Gallery:
    """Puts drawings into a page, and keeps them: their files are to lie in ``folder`` beside it."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self.drawings: list[Drawing] = []

    def __call__(self, drawing: Drawing | None) -> str:
        """A drawing's Markdown; nothing for none."""
        if drawing is None:
            return ""
        self.drawings.append(drawing)
        return drawing.markdown(self._folder)


def save_drawings(drawings: Iterable[Drawing], folder: Path) -> None:
    """Write the files of a page's drawings; those of a former page are removed, so that none is left that it does not
    show."""
    for old in folder.glob("*.svg"):
        old.unlink()
    for drawing in drawings:
        write_text(drawing.file(), folder / f"{drawing.name}.svg")
