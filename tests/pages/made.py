"""What is looked at: the site as mkdocs builds it, and reports of runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
RUNS = ROOT / "benchmarks" / "study" / "runs" / "table"


def build_site(folder: Path) -> Path:
    """Build the site into ``folder``; whatever mkdocs warns of is an error."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if built.returncode:
        raise RuntimeError(built.stdout + built.stderr)
    return folder


def write_report(folder: Path) -> Path:
    """The page that ``procon report`` writes of three runs of the study; returns its file."""
    from procon.report import read_sources, write_html

    files = [RUNS / "arithmetic" / name / "seed-0.json" for name in ("start", "plain", "procon_s")]
    runs = [source.run for source in read_sources(files)]
    return write_html(runs, folder / "three-runs.html", title="Three runs of the study", notes=["One seed."])


def pages(folder: Path) -> list[Path]:
    """All pages below ``folder``, but the one that stands in for those that are not there."""
    return sorted(path for path in folder.rglob("*.html") if path.name != "404.html")
