"""The plot of the page: bytes that each source takes, by the tokens of the data set."""

from __future__ import annotations

from functools import partial

from matplotlib.figure import Figure

from benchmarks.anchor_scale.arithmetic import MODELS, PROBE_TOKENS, PROBES, copied_bytes, probe_bytes
from benchmarks.anchor_scale.tables import TOKENS, stored
from benchmarks.anchor_scale.wording import in_bytes
from benchmarks.study.figures import Drawing
from procon.report.page import COLOURS, legend_above, new_figure

_SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


def _plot() -> Figure:
    figure = new_figure(4.6)
    axes = figure.subplots()
    for model, colour in zip(MODELS, COLOURS, strict=False):
        copy, probes = copied_bytes(model.parameters, 2), probe_bytes(PROBES, PROBE_TOKENS, model)
        axes.loglog(TOKENS, [stored(n, model) for n in TOKENS], color=colour, label=f"recorded, {model.name}")
        axes.loglog(TOKENS, [copy] * len(TOKENS), "--", color=colour, label=f"live, all weights, {model.name}")
        axes.loglog(TOKENS, [probes] * len(TOKENS), ":", color=colour, label=f"probes, {model.name}")
    axes.set_xticks(TOKENS, [f"10{str(len(str(n)) - 1).translate(_SUPERSCRIPTS)}" for n in TOKENS])
    bytes_shown = [10**exponent for exponent in range(4, 14)]
    axes.set_yticks(bytes_shown, map(in_bytes, bytes_shown))
    axes.minorticks_off()
    axes.set_xlabel("training tokens")
    legend_above(figure)
    return figure


BYTES = Drawing(
    name="anchor-bytes",
    caption=(
        "Bytes of each source: disk of recorded anchors (full lines), memory per rank of the weights that live anchors "
        "copy if all weights train, in bf16 (dashed), the file of eight probes (dotted). Under a fresh adapter live "
        "anchors take none."
    ),
    alt=(
        "Bytes by training tokens, both axes logarithmic. Recorded anchors rise in proportion to the tokens, the 70B "
        "model's two and a half times as high as those of the two smaller models, which are nearly the same. Copied "
        "weights and probes are level lines. Each model's recorded anchors cross its copied weights once: at two "
        "million tokens for the 135M model, at a hundred million for the 8B model, at four hundred million for the 70B "
        "model."
    ),
    plot=partial(_plot),
)
