"""``python -m benchmarks.study.report``: the page of results, as Markdown and as one HTML file."""

from __future__ import annotations

import math
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from markdown import markdown
from transformers import HfArgumentParser

from benchmarks.study.budgets import BUDGETS
from benchmarks.study.figures import Drawing, drift_place_drawing, part_drawings
from benchmarks.study.hypotheses import judge_hypotheses
from benchmarks.study.judge import load_judge
from benchmarks.study.outcomes import Outcomes, judges_agree
from benchmarks.study.plan import Budget, Part
from benchmarks.study.preset import candidates, choose, confirm
from benchmarks.study.settings import SETTINGS
from benchmarks.study.table import cost_table, kept_table, paper_tables, preset_table, verdict_table
from benchmarks.study.wording import LIMITS, PRESET, READING, TESTS
from procon.errors import ProConError
from procon.files import write_text
from procon.report.page import write_page

HERE = Path(__file__).parent

#: What the results mean, in words; stands in the page as it is.
DISCUSSION = HERE / "discussion.md"

FIGURES = "assets/results"

TITLE = "Results"


@dataclass
class ReportArguments:
    """Write results.md with its figures, and report.html, from the runs that are there."""

    budget: str = field(default="table", metadata={"help": "Whose parts to report: smoke, table or full."})
    runs: str | None = field(default=None, metadata={"help": "Folder of run files; benchmarks/study/runs/BUDGET."})
    output: str = field(default="docs", metadata={"help": "Folder to write to."})
    endpoint: str | None = field(
        default=None, metadata={"help": "OpenAI-compatible API of the second judge; a small classifier if not given."}
    )
    judge: str | None = field(default=None, metadata={"help": "Name of the endpoint's model."})


def main(argv: list[str] | None = None) -> int:
    (arguments,) = HfArgumentParser(
        ReportArguments, prog="python -m benchmarks.study.report"
    ).parse_args_into_dataclasses(argv)
    try:
        if arguments.budget not in BUDGETS:
            raise ProConError(f"budget is {arguments.budget!r}: choose one of {', '.join(BUDGETS)}")
        runs = Path(arguments.runs or HERE / "runs" / arguments.budget)
        budget = BUDGETS[arguments.budget]
        outcomes = Outcomes.load(budget, runs, load_judge(arguments.endpoint, arguments.judge))
        judge = (
            f"by {arguments.judge}" if arguments.judge else "by a small classifier trained on replies labelled by hand"
        )
        for path in write_report(budget, arguments.budget, outcomes, Path(arguments.output), judge):
            print(path)
    except ProConError as error:
        print(f"report: error: {error}", file=sys.stderr)
        return 2
    return 0


def write_report(budget: Budget, name: str, outcomes: Outcomes, folder: Path, judge: str) -> list[Path]:
    """Write ``results.md``, its figures and ``report.html`` to ``folder``; returns the two pages.

    Figures of a former report are removed, so that none is left that the page does not show.
    """
    text, drawings = compose(budget, name, outcomes, judge)
    figures = folder / FIGURES
    for old in figures.glob("*.svg"):
        old.unlink()
    for drawing in drawings:
        write_text(drawing.file(), figures / f"{drawing.name}.svg")
    page = write_text(text, folder / "results.md")
    return [page, write_page(TITLE, to_html(text, drawings), folder / "report.html")]


def compose(budget: Budget, name: str, outcomes: Outcomes, judge: str) -> tuple[str, list[Drawing]]:
    """The page as Markdown, and its figures. Parts without runs are left out."""
    drawings: list[Drawing] = []

    def figure(drawing: Drawing) -> str:
        drawings.append(drawing)
        return f"![{drawing.alt}]({FIGURES}/{drawing.name}.svg)\n\n{drawing.caption}"

    sections = [f"# {TITLE}", _summary(budget, name, outcomes)]
    sections += ["## Hypotheses", verdict_table(judge_hypotheses(budget.parts, outcomes)).markdown(), TESTS]
    sections += _preset(budget.parts, outcomes)
    sections += ["## How to read the tables", READING.format(judge=judge), _agreement(outcomes)]
    for part in budget.parts:
        settings = [setting for setting in part.settings if outcomes.has(part, setting)]
        if settings:
            sections += [f"## {part.title}", _question(part)]
        for setting in settings:
            sections += [f"### {_capital(SETTINGS[setting].label)}", kept_table(part, setting, outcomes).markdown()]
            sections += [_paper_note(part, setting), cost_table(part, setting, outcomes).markdown()]
            sections += map(figure, part_drawings(part, setting, outcomes))
    if plain := outcomes.find("arithmetic", "plain"):
        sections += ["## Where the drift lies", figure(drift_place_drawing(plain))]
    if DISCUSSION.is_file():
        sections.append(DISCUSSION.read_text(encoding="utf-8").strip())
    sections += ["## What this does not show", LIMITS, "## How this was made", _provenance(name, outcomes)]
    return "\n\n".join(filter(None, sections)) + "\n", drawings


def _summary(budget: Budget, name: str, outcomes: Outcomes) -> str:
    dates = sorted(run["made"]["date"][:10] for run in outcomes.runs)
    made = f"on {dates[0]}" if dates[0] == dates[-1] else f"from {dates[0]} to {dates[-1]}"
    return (
        "What fine-tuning does to a chat model's refusals, with each defence and without. All numbers, figures and "
        "verdicts on this page are computed from run files. Of the "
        f"{len(budget.cells())} runs that the budget `{name}` plans, {len(outcomes.runs)} are there, made {made}. "
        "The same in one file: [report.html](report.html)."
    )


def _preset(parts: Sequence[Part], outcomes: Outcomes) -> list[str]:
    """The choice of the default settings, where there is something to choose from."""
    among = candidates(parts, outcomes)
    if not among:
        return []
    chosen = choose(among)
    confirmed = confirm(chosen, parts, outcomes) if chosen else []
    return ["## The default settings", preset_table(among, chosen, confirmed).markdown(), PRESET]


def _agreement(outcomes: Outcomes) -> str:
    replies, kappa = judges_agree(outcomes)
    agreement = "give one verdict throughout" if math.isnan(kappa) else f"agree with Cohen's kappa {kappa:.2f}"
    return f"On all {replies} replies to malicious and benign prompts the two judges {agreement}."


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _question(part: Part) -> str:
    if part.split == "held_out":
        return part.question
    return f"{part.question} Measured on the {part.split} prompts, which choices are made by: no claim rests on it."


def _paper_note(part: Part, setting: str) -> str:
    tables = paper_tables(part, setting)
    return f"The paper's figures are from its {' and '.join(tables)}." if tables else ""


def _provenance(name: str, outcomes: Outcomes) -> str:
    made = [run["made"] for run in outcomes.runs]
    machines = Counter(entry["machine"] for entry in made)
    packages = ("python", "torch", "transformers", "peft")
    versions = {package: " and ".join(sorted({entry[package] for entry in made})) for package in packages}
    commits = Counter(str(entry["commit"]) for entry in made)
    hours = sum(run["seconds"] for run in outcomes.runs) / 3600
    trained = sum(run["train_seconds"] for run in outcomes.runs) / 3600
    return f"""\
```bash
python -m benchmarks.study --budget {name}
python -m benchmarks.study.report --budget {name}
```

- Machines: {_counted(machines)}.
- Versions: {", ".join(f"{package} {number}" for package, number in versions.items())}.
- Commits: {_counted(commits)}.
- Hours: {hours:.1f}, of which {trained:.1f} were training, summed over runs; several may have run at once.
- Seeds: {", ".join(map(str, sorted({run["seed"] for run in outcomes.runs})))}."""


def _counted(found: Counter[str]) -> str:
    return "; ".join(f"{name} ({n} {'run' if n == 1 else 'runs'})" for name, n in found.most_common())


def to_html(text: str, drawings: Sequence[Drawing]) -> str:
    """The page's Markdown as HTML with its figures in it."""
    html = markdown(text, extensions=["tables", "fenced_code"])
    html = html.replace("<table>", "<div class='wide'><table class='numbers'>").replace("</table>", "</table></div>")
    html = html.replace("<th ", "<th scope='col' ").replace("<th>", "<th scope='col'>")
    for drawing in drawings:
        image = re.compile(rf'<p><img [^>]*src="{re.escape(f"{FIGURES}/{drawing.name}.svg")}"[^>]*></p>')
        html = image.sub(lambda _, drawing=drawing: f"<figure>{drawing.element()}</figure>", html)
    return html


if __name__ == "__main__":
    sys.exit(main())
