"""What ``procon directions`` finds: those of refusal, or those of another concept; and what it says of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from procon.chat import load_instructions
from procon.cli.arguments import DirectionsArguments
from procon.directions import BlockDirections, Directions, load_directions, load_vectors
from procon.directions.concepts import check_name
from procon.errors import ProConError
from procon.settings import MAX_DIRECTIONS, ChatSettings


@dataclass(frozen=True)
class ConceptFiles:
    """What the files hold that a concept's directions are made of, read before a model is loaded."""

    name: str
    sides: dict[str, Any]
    vectors: dict[str, Any] | None

    @classmethod
    def read(cls, arguments: DirectionsArguments) -> ConceptFiles | None:
        """None if no other concept than refusal is asked for."""
        if arguments.name is None:
            return None
        check_name(arguments.name)
        sides = {side: getattr(arguments, side) for side in ("positive", "negative")}
        return cls(
            arguments.name,
            {side: load_instructions(path) for side, path in sides.items() if path},
            load_vectors(arguments.vectors) if arguments.vectors else None,
        )

    def find(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, chat: ChatSettings, batch_size: int
    ) -> Directions:
        """Their directions in ``model``."""
        common: dict[str, Any] = {"name": self.name, "chat": chat, "batch_size": batch_size, **self.sides}
        if self.vectors is None:
            return Directions.extract(model, tokenizer, **common)
        return Directions.from_vectors(model, tokenizer=tokenizer, **self.vectors, **common)


def read_others(path: str | None, name: str | None) -> BlockDirections | None:
    """The directions to add to; refused at once if one more concept, ``name`` or refusal, has no place beside them."""
    if path is None:
        return None
    others = load_directions(path)
    if (name or "refusal") in others.concepts:
        raise ProConError(f"two concepts are named {name or 'refusal'!r}: give each a name of its own")
    if others.k >= MAX_DIRECTIONS:
        raise ProConError(f"{others.k + 1} concepts are too many: combine {MAX_DIRECTIONS} at most")
    return others


def describe(found: Directions) -> Table:
    """A row for each block and concept that has a direction there, and for blocks without any."""
    table = Table("block", "concept", "gap", "AUROC", box=box.SIMPLE_HEAD)
    for site, (gaps, quality, there) in enumerate(
        zip(found.scale.tolist(), found.auroc.tolist(), found.vectors.any(-1).tolist(), strict=True)
    ):
        block = str(site) if site < found.block_count else "last output"
        if not any(there):
            table.add_row(block, "-", "no direction", "-")
        for name, gap, one, has in zip(found.names, gaps, quality, there, strict=True):
            if has:
                table.add_row(block, name, _number(gap, ".3g"), _number(one, ".2f"))
    return table


def _number(value: float, form: str) -> str:
    return "-" if value != value else format(value, form)
