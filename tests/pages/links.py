"""Links of built pages that lead nowhere."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class _Page(HTMLParser):
    """The links of a page, and the places in it that links may lead to."""

    def __init__(self, path: Path):
        super().__init__()
        self.links: list[str] = []
        self.places: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("id", "name") and value:
                self.places.add(value)
            elif name in ("href", "src") and value:
                self.links.append(value)


def dead_links(pages: list[Path], root: Path) -> list[str]:
    """Links to files that do not exist, and to places that are not in them; and what a page takes from elsewhere."""
    read = {path.resolve(): _Page(path) for path in pages}
    faults = []
    for path, page in read.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = root / parts.path.lstrip("/") if parts.path.startswith("/") else path.parent / unquote(parts.path)
            target = path if not parts.path else target.resolve()
            if target.is_dir():
                target /= "index.html"
            if not target.is_file():
                faults.append(f"{path.relative_to(root.resolve())}: {link} is no file")
            elif parts.fragment and target in read and unquote(parts.fragment) not in read[target].places:
                faults.append(f"{path.relative_to(root.resolve())}: {link} is no place of that page")
    return faults
