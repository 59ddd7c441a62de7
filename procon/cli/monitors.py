"""The monitors that ``procon drift`` reads before and after: from their file, with labelled prompts for each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from procon.chat import ContrastPrompts, load_instructions
from procon.cli.arguments import DriftArguments
from procon.directions import Directions
from procon.errors import ProConError
from procon.evaluation import MonitorChange, MonitorReading, measure_monitors
from procon.report.cells import MONITOR_HEADERS, monitor_cells
from procon.settings import ChatSettings


@dataclass(frozen=True)
class Monitors:
    """Probes, and the prompts that each is read on."""

    probes: Directions
    prompts: dict[str, ContrastPrompts]

    @classmethod
    def read(cls, arguments: DriftArguments) -> Monitors | None:
        """None if no monitors are asked for."""
        if arguments.monitors is None:
            return None
        probes = Directions.load(arguments.monitors)
        sides = []
        for side in ("positive", "negative"):
            files = [file.strip() for file in str(getattr(arguments, side)).split(",")]
            if len(files) not in (1, probes.k):
                raise ProConError(
                    f"{side} names {len(files)} files for the {probes.k} monitors {', '.join(probes.names)}: give one, "
                    "or one for each in this order"
                )
            texts = [load_instructions(file) for file in files]
            sides.append(texts * probes.k if len(texts) == 1 else texts)
        pairs = zip(probes.names, *sides, strict=True)
        return cls(probes, {name: ContrastPrompts(positive, negative) for name, positive, negative in pairs})

    def measure(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, chat: ChatSettings, batch_size: int
    ) -> dict[str, MonitorReading]:
        """What they read of ``model``."""
        return measure_monitors(model, tokenizer, self.probes, self.prompts, chat=chat, batch_size=batch_size)


def rows_of(changes: Mapping[str, MonitorChange]) -> list[dict[str, Any]]:
    """A dict for each monitor and block."""
    return [row for name, change in changes.items() for row in change.rows(name)]


def describe(changes: Mapping[str, MonitorChange]) -> Table:
    """A row for each monitor and block."""
    table = Table(*MONITOR_HEADERS, box=box.SIMPLE_HEAD)
    for row in rows_of(changes):
        table.add_row(*monitor_cells(row))
    return table
