"""Training arguments with the constraint's settings."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import TrainingArguments

from procon.constraint import Blocks
from procon.errors import ProConError
from procon.schedule import AlphaSchedule
from procon.sequences import REDUCTIONS, TOKEN_SCOPES


@dataclass
class ProConArguments:
    """The settings of the constraint, to mix into any TrainingArguments::

        @dataclass
        class MyConfig(ProConArguments, MyTrainingArguments): ...

    Their names begin with ``procon_``. Schedule, scope and penalty default to what trials on validation prompts
    chose and the study confirmed on held-out ones (``docs/results.md``); the paper constrains response tokens alone.
    """

    procon_schedule: str = field(
        default="procon_s",
        metadata={
            "help": "Strength over training: procon_s[:ALPHA], procon_wu[:ALPHA@4ep] (extra warm-up epochs, then 0), "
            "or phases such as 1@2ep,0.1@200steps,0. 0 switches the constraint off."
        },
    )
    procon_scope: str = field(
        default="all", metadata={"help": "Tokens that are constrained: response (paper), prompt or all."}
    )
    procon_blocks: str = field(
        default="all",
        metadata={"help": "Blocks: all (paper), the deepest share such as 0.5, or indices such as 8,9,10."},
    )
    procon_penalty: str = field(
        default="absolute", metadata={"help": "squared, absolute (as typeset in the paper) or huber."}
    )
    procon_units: str = field(
        default="raw",
        metadata={"help": "raw (paper), or gap: each block in units of its malicious-benign distance."},
    )
    procon_reduction: str = field(
        default="token",
        metadata={"help": "token: mean over constrained tokens; sequence: mean over sequences of each one's mean."},
    )
    procon_fuse: str = field(
        default="auto",
        metadata={"help": "auto: inside the blocks' own RMSNorm where possible; never: ahead of the block."},
    )
    procon_backend: str = field(default="auto", metadata={"help": "auto, triton or eager."})
    procon_anchors_dir: str | None = field(
        default=None, metadata={"help": "Where initial projections are kept; OUTPUT_DIR/_anchors if not given."}
    )

    def __post_init__(self):
        if hasattr(super(), "__post_init__"):
            super().__post_init__()
        if self.procon_scope not in TOKEN_SCOPES:
            raise ProConError(f"procon_scope is {self.procon_scope!r}: choose one of {', '.join(TOKEN_SCOPES)}")
        if self.procon_reduction not in REDUCTIONS:
            raise ProConError(f"procon_reduction is {self.procon_reduction!r}: choose one of {', '.join(REDUCTIONS)}")
        if self.procon_fuse not in ("auto", "never"):
            raise ProConError(f"procon_fuse is {self.procon_fuse!r}: choose auto or never")
        self.schedule()
        self.blocks()

    def schedule(self) -> AlphaSchedule:
        """The parsed ``procon_schedule``."""
        return AlphaSchedule.parse(self.procon_schedule)

    def blocks(self) -> Blocks:
        """The parsed ``procon_blocks``."""
        text = self.procon_blocks.strip()
        try:
            if text == "all":
                return "all"
            if "." in text or text == "1":
                return float(text)
            return [int(part) for part in text.split(",")]
        except ValueError:
            raise ProConError(
                f"procon_blocks is {self.procon_blocks!r}: give all, a share such as 0.5, or indices such as 8,9,10"
            ) from None


@dataclass
class ProConConfig(ProConArguments, TrainingArguments):
    """transformers' TrainingArguments with the settings of the constraint."""
