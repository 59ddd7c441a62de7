"""What pages of results are made of: figures beside the text, the sections of a part, and how runs were made."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.study.figures import Drawing, drift_drawing, part_drawing
from benchmarks.study.jobs import find_job
from benchmarks.study.outcomes import Outcomes
from benchmarks.study.plan import Part
from benchmarks.study.table import (
    beside_table,
    cost_table,
    folded,
    fresh_table,
    judged_table,
    kept_table,
    moved_table,
    paper_sources,
    paper_table,
)
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


def part_sections(part: Part, outcomes: Outcomes, figure: Gallery, rival: str | None = None) -> list[str]:
    """What a part found, as Markdown; nothing if it has no runs.

    Args:
        figure: of the page.
        rival: the name of a method that all others are compared with.
    """
    jobs = [job for job in part.jobs if outcomes.has(part, job)]
    sections = [f"## {part.title}", _question(part)] if jobs else []
    for job in jobs:
        if len(part.jobs) > 1:
            label = find_job(job).label
            sections.append(f"### {label[0].upper()}{label[1:]}")
        sections.append(kept_table(part, job, outcomes).markdown())
        if rival is not None:
            label = next(method.label for method in part.methods if method.name == rival)
            sections += [
                f"Beside {label}, on the seeds that both have; rates in percentage points:",
                beside_table(part, job, outcomes, rival).markdown(),
            ]
        if fresh := fresh_table(part, job, outcomes):
            sections += [
                "On the second set of prompts, and replies that comply in spite of a refusal:",
                fresh.markdown(),
            ]
        sections.append(figure(part_drawing(part, job, outcomes)))
        sections.append(
            folded("Second judge, log-odds, degenerate replies", judged_table(part, job, outcomes).markdown())
        )
        if paper := paper_table(part, job):
            sources = f"From the paper's {' and '.join(paper_sources(part, job))}."
            sections.append(folded("The paper's figures", paper.markdown(), sources))
        drift = figure(drift_drawing(part, job, outcomes))
        sections.append(folded("How far hidden states moved", moved_table(part, job, outcomes).markdown(), drift))
        sections.append(folded("Perplexity, time, memory, seeds", cost_table(part, job, outcomes).markdown()))
    return sections


def _question(part: Part) -> str:
    data = f" Training data: {find_job(part.jobs[0]).label}." if len(part.jobs) == 1 else ""
    if part.split == "held_out":
        return part.question + data
    return (
        f"{part.question}{data} Measured on the {part.split} prompts, which serve for choices: no claim rests on them."
    )


def how_made(runs: Sequence[dict], budget: str, packages: Sequence[str] = ()) -> str:
    """The commands that make the runs again, and what is in their file; ``packages`` beyond those of every study."""
    made = [run["made"] for run in runs]
    machines = Counter(entry["machine"] for entry in made)
    packages = ("python", "torch", "transformers", "peft", *packages)
    versions = {package: " and ".join(sorted({entry[package] for entry in made})) for package in packages}
    commits = Counter(str(entry["commit"]) for entry in made)
    hours = sum(run["seconds"] for run in runs) / 3600
    trained = sum(run["train_seconds"] for run in runs) / 3600
    return f"""\
```bash
python -m benchmarks.study --budget {budget}
python -m benchmarks.study.report --budget {budget} --output FOLDER
```

- Machines: {_counted(machines)}.
- Versions: {", ".join(f"{package} {number}" for package, number in versions.items())}.
- Commits: {_counted(commits)}.
- Hours: {hours:.1f}, of which {trained:.1f} were training, summed over runs; several may have run at once.
- Seeds: {", ".join(map(str, sorted({run["seed"] for run in runs})))}."""


def when_made(runs: Sequence[dict]) -> str:
    """The day on which runs were made, or the first and the last."""
    dates = sorted(run["made"]["date"][:10] for run in runs)
    return f"on {dates[0]}" if dates[0] == dates[-1] else f"from {dates[0]} to {dates[-1]}"


def _counted(found: Counter[str]) -> str:
    return "; ".join(f"{name} ({n} {'run' if n == 1 else 'runs'})" for name, n in found.most_common())
