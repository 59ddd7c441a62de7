"""``python tests/pages``: the site and a report in Chromium, at two widths, light and dark.

``check`` names what is too wide, cut off, too small or too faint, and links that lead nowhere. ``screenshots FOLDER``
makes a picture of every page, at each width and in each scheme.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import chromium
import links
import looks
import made


def main() -> int:
    parser = argparse.ArgumentParser(prog="python tests/pages", description=__doc__.split("\n", 1)[0])
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="name what is wrong")
    screenshots = commands.add_parser("screenshots", help="a picture of every page")
    screenshots.add_argument("folder", type=Path)
    for command in (check, screenshots):
        command.add_argument("--site", type=Path, help="a site that is built; built for this if not given")
        command.add_argument("--only", default="", help="pages with this in their path")
    arguments = parser.parse_args()
    if reason := chromium.why_not():
        print(f"pages: error: {reason}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        site = arguments.site or made.build_site(Path(folder) / "site")
        report = made.write_report(Path(folder))
        shown = [(str(path.relative_to(site)), path) for path in made.pages(site)]
        shown = [(name, path) for name, path in [*shown, (report.name, report)] if arguments.only in name]
        with chromium.a_tab() as tab:
            if arguments.command == "screenshots":
                take(tab, shown, arguments.folder)
                return 0
            faults = [f"{name}: {fault}" for name, path in shown for fault in looks.faults(tab, path)]
        faults += links.dead_links(made.pages(site), site)
    print(*faults, sep="\n")
    print(f"{len(shown)} pages, {len(faults)} faults", file=sys.stderr)
    return 1 if faults else 0


def take(tab, shown: list[tuple[str, Path]], folder: Path) -> None:
    """Pictures of whole pages, named by page, width and scheme."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, path in shown:
        looks.visit(tab, path)
        for width in looks.WIDTHS:
            tab.set_viewport_size({"width": width, "height": 800})
            for scheme in looks.SCHEMES:
                looks.show(tab, scheme)
                stem = name.removesuffix(".html").removesuffix("/index").replace("/", "-")
                tab.screenshot(path=str(folder / f"{stem}-{width}-{scheme}.png"), full_page=True)


if __name__ == "__main__":
    sys.exit(main())
