"""The commands: what each takes, and where the function that takes it is."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

from procon.cli import arguments


@dataclass(frozen=True)
class Command:
    """One subcommand: its own arguments, and where the function that takes them is.

    Attributes:
        positional: settings that the words before the first flag are for, in this order. One that is a list takes all
            words that are left.
        trains: whether the function takes a ProConConfig as well.
    """

    arguments: type[Any]
    module: str
    function: str
    positional: tuple[str, ...] = ()
    trains: bool = False

    def argument_types(self) -> tuple[type[Any], ...]:
        """The dataclasses that the command line is parsed into."""
        return (self.arguments, import_module("procon.training").ProConConfig) if self.trains else (self.arguments,)

    def run(self, *parsed: object) -> None:
        getattr(import_module(self.module), self.function)(*parsed)


COMMANDS = {
    "quickstart": Command(arguments.QuickstartArguments, "procon.cli.commands", "quickstart", ("model",)),
    "directions": Command(arguments.DirectionsArguments, "procon.cli.commands", "directions", ("model",)),
    "train": Command(arguments.TrainArguments, "procon.cli.train", "train", ("model", "data"), trains=True),
    "drift": Command(arguments.DriftArguments, "procon.cli.commands", "drift", ("start", "tuned")),
    "eval": Command(arguments.EvalArguments, "procon.cli.commands", "evaluation", ("model",)),
    "report": Command(arguments.ReportArguments, "procon.cli.reports", "report", ("runs",)),
    "env": Command(arguments.EnvArguments, "procon.cli.environment", "environment"),
    "completion": Command(arguments.CompletionArguments, "procon.cli.completion", "completion", ("shell",)),
}
