"""One self-contained HTML page, and plots in it that take the page's ink."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from procon.files import write_text

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType  # since 3.11

# Mid tones with a contrast of at least 3:1 on white and on near-black alike.
COLOURS = ("#2f7fd1", "#d9660b", "#1f9d6b", "#a05fc9", "#d1495b", "#7d858c")
DASHES = ("-", "--", "-.", ":")
# Stand-ins that the page turns into its own text and rule colours, which differ between light and dark.
INK, RULE = "#010203", "#040506"
PLOT_STYLE: dict[RcKeyType, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "procon",
    "text.parse_math": False,
    "axes.formatter.useoffset": False,
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": RULE,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "legend.frameon": False,
}

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""

_STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1b1f24; --soft: #57606a; --rule: #c4cad1; --band: #f4f6f8; }
@media (prefers-color-scheme: dark) {
  :root { --page: #15181c; --ink: #e4e7eb; --soft: #a0a9b3; --rule: #454d57; --band: #1e2329; }
}
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 2rem 1rem 4rem; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 1.5rem; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { padding: .4rem .7rem; border-bottom: 1px solid var(--rule); text-align: left; vertical-align: top; }
thead th { vertical-align: bottom; }
tbody th { font-weight: 600; }
.numbers { width: 100%; font-variant-numeric: tabular-nums; }
.numbers td { white-space: nowrap; }
.numbers td, .numbers thead th:not(:first-child) { text-align: right; }
.numbers small { display: block; }
.wide { overflow-x: auto; }
.replies td, .replies th { min-width: 11rem; font-size: .85rem; }
.replies p { margin: .2rem 0 0; white-space: pre-wrap; overflow-wrap: anywhere; }
small, figcaption, .caption, .replies b { color: var(--soft); }
figcaption, .caption, small { font-size: .85rem; }
figure { margin: 0; }
svg { display: block; width: 100%; height: auto; }
svg text { font-family: system-ui, sans-serif !important; }
details { margin: .5rem 0; border: 1px solid var(--rule); border-radius: 6px; }
summary { padding: .5rem .8rem; background: var(--band); border-radius: 6px; cursor: pointer; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1rem; font-size: .9rem; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
"""


def write_page(title: str, body: str, path: str | Path) -> Path:
    """Write the HTML ``body``, headings included, as a page that needs no other file; returns the path."""
    page = _PAGE.format(title=escape(title), style=_STYLE, body=body)
    return write_text(page.encode(errors="backslashreplace").decode(), path)  # half a surrogate pair is no character


def new_figure(height: float) -> Figure:
    """As wide as the page; ``height`` in inches."""
    return Figure(figsize=(8.4, height), layout="constrained")


def whole_numbers() -> MaxNLocator:
    """Ticks for blocks and steps."""
    return MaxNLocator(8, integer=True, steps=[1, 2, 5, 10])


def legend_above(figure: Figure) -> None:
    """One legend above the panels, each label once."""
    handles = {
        label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    columns = max(1, 100 // (max(map(len, handles)) + 6))
    figure.legend(handles.values(), handles.keys(), loc="outside upper left", ncols=min(columns, len(handles)))


def to_svg(plot: Callable[[], Figure], name: str, alt: str) -> str:
    """The figure as an ``<svg>`` element that takes its ink from the page and may stand beside others.

    Args:
        plot: draws the figure; called under the page's style.
        name: begins the element's ids, so that those of two plots differ.
        alt: what the figure shows, in words.
    """
    svg = draw_svg(plot).replace(INK, "currentColor").replace(RULE, "var(--rule)")
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    return re.sub(
        r'<svg[^>]*?(viewBox="[^"]*")[^>]*>',
        lambda tag: f'<svg xmlns:xlink="http://www.w3.org/1999/xlink" {tag[1]} role="img" aria-label="{escape(alt)}">',
        svg,
        count=1,
    )


def draw_svg(plot: Callable[[], Figure]) -> str:
    """The figure as an ``<svg>`` element with INK and RULE for the page's colours; the same each time."""
    buffer = io.StringIO()
    with mpl.rc_context(PLOT_STYLE):
        plot().savefig(buffer, format="svg", metadata={"Date": None})
    svg = re.sub(r"<metadata>.*?</metadata>", "", buffer.getvalue(), flags=re.DOTALL)
    # A hundredth of a point is finer than can be seen.
    svg = re.sub(r' (?:d|x|y)="[^"]*"', lambda place: re.sub(r"(\.\d\d)\d+", r"\1", place[0]), svg)
    return svg[svg.index("<svg") :]
