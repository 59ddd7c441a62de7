"""The plots of the page: shares of a clone's bandwidth, and training steps beside the plain one."""

from __future__ import annotations

from functools import partial

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from benchmarks.gpu_page.folder import Folder
from benchmarks.gpu_page.goals import LEAST_SHARE, MOST_OF_PLAIN, in_goal
from benchmarks.gpu_page.measured import Group, Shape, Timing, by_shape, ceilings, share
from benchmarks.gpu_page.names import NORMS, STEPS, plain
from benchmarks.harness.interleaved import Ratio
from benchmarks.study.figures import Drawing
from procon.report.page import COLOURS, INK, new_figure

_OURS, _OTHERS = COLOURS[0], COLOURS[-1]


def drawings(folder: Folder) -> list[Drawing]:
    """Those that there are results for."""
    return [drawing for drawing in (_shares(folder), _steps(folder)) if drawing]


def _shares(folder: Folder) -> Drawing | None:
    clones, norms = ceilings(folder.groups("clone")), by_shape(folder.groups("rms_norm_penalty"))
    shape = next((shape for shape in norms if shape in clones), None)
    if shape is None or not LEAST_SHARE.keys() <= norms[shape].keys():
        return None
    return Drawing(
        name="gpu-norm",
        caption=(
            f"Bandwidth of RMSNorms at {shape}, as a share of a clone's: medians, with quartiles. Bytes are the fewest "
            f"that each pass takes. {'Dashed: the goals.' if in_goal(shape) else ''}"
        ).strip(),
        alt=f"Bars of the share of a clone's bandwidth at {shape}, forward and backward, one per norm; ours in blue.",
        plot=partial(_plot_shares, shape, norms[shape], clones[shape]),
    )


def _plot_shares(shape: Shape, passes: dict[str, Group], clone: Timing) -> Figure:
    names = [name for name in NORMS if any(name in passes[which] for which in LEAST_SHARE)]
    figure = new_figure(1.2 + 0.5 * len(names))
    for axes, (which, bound) in zip(figure.subplots(2, sharex=True), LEAST_SHARE.items(), strict=True):
        shares = {NORMS[name]: share(passes[which][name], clone) for name in names if name in passes[which]}
        _bars(axes, shares, [NORMS["ours_constrained"], NORMS["ours"]])
        if in_goal(shape):
            axes.axvline(bound, linestyle="--", color=INK)
        axes.set_title(which)
        axes.xaxis.set_major_formatter(PercentFormatter(1))
    return figure


def _steps(folder: Folder) -> Drawing | None:
    group = next((group for group in folder.groups("training_step_7b").values() if "plain" in group), None)
    if group is None or not STEPS.keys() & group.keys():
        return None
    return Drawing(
        name="gpu-step",
        caption=(
            "Time of a LoRA step of the 7B shape over the plain step's: medians and 95% intervals. Dashed: the goal."
        ),
        alt=(
            "Points for the time of a training step over the plain step's, one per way to train; the constraint inside "
            "RMSNorm in blue."
        ),
        plot=partial(_plot_steps, group),
    )


def _plot_steps(group: Group) -> Figure:
    ratios = {name: group[name].over("plain") for name in STEPS if name in group}
    figure = new_figure(0.8 + 0.3 * len(ratios))
    axes = figure.subplots()
    for place, (name, ratio) in enumerate(ratios.items()):
        spread = [[ratio.median - ratio.low], [ratio.high - ratio.median]]
        axes.errorbar(ratio.median, place, xerr=spread, fmt="o", color=_OURS if name == "fused" else _OTHERS)
    axes.set_yticks(range(len(ratios)), [plain(STEPS[name]) for name in ratios])
    axes.set_ylim(len(ratios) - 0.5, -0.5)
    axes.axvline(MOST_OF_PLAIN, linestyle="--", color=INK)
    axes.set_xlabel("time over the plain step's")
    return figure


def _bars(axes: Axes, figures: dict[str, Ratio], ours: list[str]) -> None:
    """Bars as those of :mod:`benchmarks.draw`, from the top."""
    medians = [figure.median for figure in figures.values()]
    spread = [
        [figure.median - figure.low for figure in figures.values()],
        [figure.high - figure.median for figure in figures.values()],
    ]
    colours = [_OURS if name in ours else _OTHERS for name in figures]
    axes.barh([plain(name) for name in figures], medians, xerr=spread, color=colours, ecolor=INK)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
