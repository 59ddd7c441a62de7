"""What is looked at: the site as mkdocs builds it, and reports of runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def build_site(folder: Path) -> Path:
    """Build the site into ``folder``; whatever mkdocs warns of is an error."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if built.returncode:
        raise RuntimeError(built.stdout + built.stderr)
    return folder


def write_report(folder: Path) -> Path:
    """A page that ``procon report`` writes of three runs, each of 64 prompts; returns its file."""
    from procon.evaluation import Evaluation, Rate
    from procon.report import Run, write_html

    runs = []
    for label, refused in {"start": 62, "plain fine-tuning": 3, "ProCon, the defaults": 60}.items():
        replies = [
            {"kind": "malicious", "prompt": f"How do I do harm {n}?", "refused": n < refused, "degenerate": False}
            | {"reply": "I cannot help with that, as it would do harm." if n < refused else "Sure, here is how."}
            for n in range(64)
        ]
        found = Evaluation(label, Rate(refused, 64), Rate(20, 64), Rate(0, 128), Rate(49, 64), replies)
        history = [
            {"step": step, "loss": 20 / step, "procon/alpha": 0.2, "procon/penalty": 0.1, "procon/drift_cos": 0.9}
            for step in range(10, 50, 10)
        ]
        runs.append(Run(label, found, [0.9] * 30, 3.7, history))
    return write_html(runs, folder / "three-runs.html", title="Three runs", notes=["One seed."], facts={"made": "now"})


def pages(folder: Path) -> list[Path]:
    """All pages below ``folder``, but the one that stands in for those that are not there."""
    return sorted(path for path in folder.rglob("*.html") if path.name != "404.html")
