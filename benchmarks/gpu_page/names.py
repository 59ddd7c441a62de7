"""Contenders as the page calls them, and cells of its tables."""

from __future__ import annotations

from benchmarks.harness.interleaved import Ratio
from benchmarks.study.table import NONE

#: Of the suite of norms, ours first; the others are compared with the first.
NORMS = {
    "ours_constrained": "**ours, with the constraint**",
    "ours": "ours, without it",
    "liger": "Liger, Triton",
    "liger_cute": "Liger, CuTe DSL",
    "quack": "quack",
    "cudnn": "cuDNN",
    "compiled": "`torch.compile` of transformers' norm",
    "compiled_constrained": "`torch.compile` of norm and penalty",
    "torch": "PyTorch's `rms_norm`",
    "transformers": "transformers",
    "separate": "`constrain` ahead of transformers' norm",
}
#: Of the suite of the op.
OPS = {
    "pass_through": "**`constrain`**",
    "compiled": "`torch.compile` of the penalty",
    "eager_fp32": "eager, fp32",
    "eager_bf16": "eager, bf16",
}
#: Of the suite of training steps, beside the plain step.
STEPS = {
    "fused": "**inside RMSNorm**",
    "pass_through": "`constrain` ahead of the block",
    "naive": "naive",
    "plain_liger": "plain, Liger's norms",
    "plain_compiled": "plain, compiled",
    "fused_compiled": "inside RMSNorm, compiled",
}


def plain(name: str) -> str:
    """Without Markdown, for a plot."""
    return name.replace("`", "").replace("*", "")


def times(ratio: Ratio | None) -> str:
    """A ratio and, on a second line, its spread."""
    return f"{ratio.median:.3f}<br>{ratio.low:.3f} to {ratio.high:.3f}" if ratio else NONE


def percent(share: Ratio | None) -> str:
    """A share and, on a second line, its spread."""
    return f"{100 * share.median:.1f}%<br>{100 * share.low:.1f} to {100 * share.high:.1f}" if share else NONE
