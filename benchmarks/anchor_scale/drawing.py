"""The plot of the page: bytes that each source takes, by the tokens of the data set."""

from __future__ import annotations

from functools import partial

from matplotlib.figure import Figure

from benchmarks.anchor_scale.arithmetic import MODELS, PROBE_TOKENS, PROBES, copied_bytes, probe_bytes
from benchmarks.anchor_scale.tables import TOKENS, stored
from benchmarks.anchor_scale.wording import in_bytes
from benchmarks.study.figures import Drawing, label_beside
from procon.report.page import COLOURS, new_figure

_SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


def _plot() -> Figure:
    figure = new_figure(4.4)
    axes = figure.subplots()
    labels, colours = [], []
    for model, colour in zip(MODELS, COLOURS, strict=False):
        copy, probes = copied_bytes(model.parameters, 2), probe_bytes(PROBES, PROBE_TOKENS, model)
        size = model.name.rpartition("-")[2]
        for name, line, style in (
            (f"recorded, {size}", [stored(n, model) for n in TOKENS], "-"),
            (f"live, {size}", [copy] * len(TOKENS), "--"),
            (f"probes, {size}", [probes] * len(TOKENS), ":"),
        ):
            axes.loglog(TOKENS, line, style, color=colour)
            labels.append((name, TOKENS[-1], line[-1]))
            colours.append(colour)
    axes.set_xticks(TOKENS, [f"10{str(len(str(n)) - 1).translate(_SUPERSCRIPTS)}" for n in TOKENS])
    bytes_shown = [10**exponent for exponent in range(4, 14)]
    axes.set_yticks(bytes_shown, map(in_bytes, bytes_shown))
    axes.minorticks_off()
    axes.set_xlabel("training tokens")
    axes.autoscale_view()
    label_beside(axes, labels, colours)
    return figure


BYTES = Drawing(
    name="anchor-bytes",
    caption=(
        "Bytes of each source for SmolLM2-135M, Llama-3-8B and Llama-3-70B: disk of recorded anchors (full lines), "
        "memory per rank of the weights that live anchors copy if all weights train, in bf16 (dashed), the file of "
        "the probes (dotted). Under a fresh adapter live anchors take none."
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
