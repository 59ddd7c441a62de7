"""One self-contained HTML page, and plots in it that take the page's ink."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from html import escape
from pathlib import Path
from textwrap import fill
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
#: Of every figure, in inches, and how many letters that is. A phone shows its text nearly as large as drawn, and a
#: desktop two figures side by side.
WIDTH, _LETTERS = 4.8, 56
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

_COLOURS = """
:root { color-scheme: light dark; --page: #fff; --ink: #1b1f24; --soft: #57606a; --rule: #c4cad1; --band: #f4f6f8; }
@media (prefers-color-scheme: dark) {
  :root { --page: #15181c; --ink: #e4e7eb; --soft: #a0a9b3; --rule: #454d57; --band: #1e2329; }
}
"""

_STYLE = (
    _COLOURS
    + """\
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 2rem 1rem 4rem; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 1.5rem; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; text-wrap: balance; }
h3 { font-size: 1rem; margin: 1.6rem 0 .4rem; }
a { color: inherit; }
table { border-collapse: collapse; font-size: .9rem; width: 100%; overflow-wrap: normal; }
th, td { padding: .4rem .7rem; border-bottom: 1px solid var(--rule); text-align: left; vertical-align: top; }
thead th { vertical-align: bottom; font-weight: 600; }
tbody th { font-weight: 600; overflow-wrap: anywhere; min-width: 5rem; }
table { font-variant-numeric: tabular-nums; }
.number { text-align: right; }
td small { display: block; white-space: nowrap; font-size: .9em; }
.replies { display: grid; gap: .8rem; }
.replies h3 { margin: .8rem 0 0; font-size: .9rem; }
.replies dl { margin: 0; grid-template-columns: repeat(auto-fit, minmax(min(100%, 14rem), 1fr)); gap: .6rem 1.2rem; }
.replies dt { display: inline; font-weight: 600; color: var(--ink); }
.replies dd { font-size: .85rem; }
.replies p { margin: .2rem 0 0; white-space: pre-wrap; overflow-wrap: anywhere; }
small, figcaption, .caption, .replies b { color: var(--soft); }
figcaption, .caption { font-size: .85rem; }
.beside { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 25rem), 1fr)); gap: .6rem 2rem; }
figure { margin: 0; }
figure svg { display: block; width: 100%; max-width: 34rem; height: auto; }
svg text { font-family: system-ui, sans-serif !important; }
details { margin: .5rem 0; padding: 0 .8rem; border: 1px solid var(--rule); border-radius: 6px; }
details[open] { padding-bottom: .8rem; }
summary { margin: 0 -.8rem; padding: .5rem .8rem; background: var(--band); border-radius: 6px; cursor: pointer; }
pre { overflow-x: auto; background: var(--band); padding: .6rem .8rem; border-radius: 6px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1rem; font-size: .9rem; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 40rem) {
  table { font-size: .78rem; }
  th, td { padding: .35rem .25rem; }
  tbody th { min-width: 3.5rem; }
}
"""
)

#: What a figure in a file of its own needs beside itself: the page's colours, as its reader has them.
_ALONE = f"{_COLOURS}svg {{ color: var(--ink); background: var(--page); }}"


def write_page(title: str, body: str, path: str | Path) -> Path:
    """Write the HTML ``body``, headings included, as a page that needs no other file; returns the path."""
    page = _PAGE.format(title=escape(title), style=_STYLE, body=body)
    return write_text(page.encode(errors="backslashreplace").decode(), path)  # half a surrogate pair is no character


def new_figure(height: float) -> Figure:
    """As wide as half a page, or a phone; ``height`` in inches."""
    return Figure(figsize=(WIDTH, height), layout="constrained")


def whole_numbers() -> MaxNLocator:
    """Ticks for blocks and steps."""
    return MaxNLocator(8, integer=True, steps=[1, 2, 5, 10])


def legend_above(figure: Figure) -> None:
    """One legend above the panels, each label once."""
    handles = {
        label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    columns = max(1, _LETTERS // (max(map(len, handles)) + 6))
    labels = [label if len(label) < _LETTERS else fill(label, _LETTERS) for label in handles]
    figure.legend(handles.values(), labels, loc="outside upper left", ncols=min(columns, len(handles)))


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
        lambda tag: (
            f'<svg xmlns:xlink="http://www.w3.org/1999/xlink" xmlns="http://www.w3.org/2000/svg" {tag[1]} '
            f'stroke-linejoin="round" role="img" aria-label="{escape(alt)}">'
        ),
        svg,
        count=1,
    )


def to_svg_file(plot: Callable[[], Figure], name: str, alt: str) -> str:
    """The same as a file of its own, in light or dark ink as its reader prefers.

    A page that takes it in leaves out the ``<style>``, and gives ``--rule`` a colour.
    """
    svg = to_svg(plot, name, alt)
    return f'<?xml version="1.0" encoding="utf-8"?>\n{svg.replace(">", f"><style>{_ALONE}</style>", 1)}'


def draw_svg(plot: Callable[[], Figure]) -> str:
    """The figure as an ``<svg>`` element with INK and RULE for the page's colours; the same each time."""
    buffer = io.StringIO()
    with mpl.rc_context(PLOT_STYLE):
        plot().savefig(buffer, format="svg", metadata={"Date": None})
    # A style of all elements would be one of the page's too.
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", buffer.getvalue(), flags=re.DOTALL)
    # A hundredth of a point is finer than can be seen.
    svg = re.sub(r' (?:d|x|y)="[^"]*"', lambda place: re.sub(r"(\.\d\d)\d+", r"\1", place[0]), svg)
    return svg[svg.index("<svg") :]
