"""One self-contained HTML page, and plots in it that take the page's ink."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from html import escape
from pathlib import Path
from string import Template
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

#: With ``$title`` and ``$body``.
_PAGE = Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))


def write_page(title: str, body: str, path: str | Path) -> Path:
    """Write the HTML ``body``, headings included, as a page that needs no other file; returns the path."""
    return write_text(_PAGE.substitute(title=escape(title), body=body), path)


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
    """The figure as an ``<svg>`` element that takes its ink from the page and may stand beside others; always the same.

    Args:
        plot: draws the figure; called under the page's style.
        name: begins the element's ids, so that those of two plots differ.
        alt: what the figure shows, in words.
    """
    buffer = io.StringIO()
    with mpl.rc_context(PLOT_STYLE):
        plot().savefig(buffer, format="svg", metadata={"Date": None})
    # A style of all elements would be one of the page's too.
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", buffer.getvalue(), flags=re.DOTALL)
    # A hundredth of a point is finer than can be seen.
    svg = re.sub(r' (?:d|x|y)="[^"]*"', lambda place: re.sub(r"(\.\d\d)\d+", r"\1", place[0]), svg)
    svg = svg.replace(INK, "currentColor").replace(RULE, "var(--rule)")
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    return re.sub(
        r'<svg[^>]*?(viewBox="[^"]*")[^>]*>',
        lambda tag: (
            f'<svg xmlns:xlink="http://www.w3.org/1999/xlink" xmlns="http://www.w3.org/2000/svg" {tag[1]} '
            f'stroke-linejoin="round" role="img" aria-label="{escape(alt)}">'
        ),
        svg[svg.index("<svg") :],
        count=1,
    )
