"""The ``procon`` command: settings from flags and a YAML file, ``--help``, and bad input as one line.

All of it is done before the command's own module is imported: with it come torch and transformers, which take seconds.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from difflib import get_close_matches
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from procon.cli import arguments
from procon.errors import ProConError, printable, require_extra
from procon.settings import CHOICES, DATA_SUFFIXES, PAPER_RECIPE, ProConSettings, check_choice, check_name
from procon.version import __version__


@dataclass(frozen=True)
class Command:
    """One subcommand: its settings, the function that takes them, and which the words before the first flag are for."""

    arguments: type[Any]
    function: str
    words: tuple[str, ...] = ("model",)


COMMANDS = {
    "quickstart": Command(arguments.QuickstartArguments, "commands.quickstart"),
    "directions": Command(arguments.DirectionsArguments, "commands.directions"),
    "train": Command(arguments.TrainArguments, "train.train", ("model", "data")),
    "drift": Command(arguments.DriftArguments, "commands.drift", ("start", "tuned")),
    "eval": Command(arguments.EvalArguments, "commands.evaluation"),
    "report": Command(arguments.ReportArguments, "commands.report", ("runs",)),
}

#: Defaults of ``procon train`` that are not TrainingArguments' own.
_DEFAULTS: dict[str, Any] = {
    "output_dir": "procon-output",
    "learning_rate": PAPER_RECIPE.learning_rate,
    "logging_steps": 10,
    "report_to": "none",
}

#: Of transformers' TrainingArguments those that the help lists, by titles.
_LISTED = {
    "length and batches": "num_train_epochs max_steps per_device_train_batch_size gradient_accumulation_steps seed",
    "optimiser": "learning_rate lr_scheduler_type warmup_steps optim weight_decay max_grad_norm",
    "precision and memory": "bf16 gradient_checkpointing use_cpu dataloader_num_workers",
    "evaluation": "eval_strategy eval_steps per_device_eval_batch_size load_best_model_at_end",
    "saving and logging": "output_dir save_strategy save_steps save_total_limit logging_steps report_to run_name",
}
_TITLES = {name: title for title, names in _LISTED.items() for name in names.split()}

#: Numbers of transformers that are 1 or more; others are 0 or more, unless they are negative by default.
_FROM_1 = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")

#: What numbers are below; others are below 2**63.
_BELOW = {"seed": 2**32, "data_seed": 2**32, "lora_dropout": 1, "adam_beta1": 1, "adam_beta2": 1}

_NOTES = (
    "Settings may also stand in a YAML file, by the same names: --config FILE.yaml. Flags win over it. Names take "
    "dashes too: --batch-size is --batch_size. procon train takes all of transformers' TrainingArguments."
)

_SWITCH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}

#: By the first word of an annotation: what reads a value, and what it has to be. Others are texts.
_READERS: dict[str, tuple[Callable[[str], Any], str]] = {
    "bool": (lambda text: _SWITCH[text.lower()], "true or false"),
    "int": (int, "a whole number"),
    "float": (float, "a number"),
    "dict": (lambda text: dict(json.loads(text)), """a JSON object, such as '{"enable_thinking": false}'"""),
}


@dataclass(frozen=True)
class Setting:
    """A flag, as the field of a dataclass says in its source.

    Attributes:
        kind: the annotation.
        default: None if there is none, or none to show.
        group: the title that it is listed under; not listed if it is empty.
    """

    name: str
    kind: str
    default: Any = None
    help: str = ""
    group: str = ""
    reads: str = ""
    choices: tuple[str, ...] = ()
    least: float = -(2**63)
    required: bool = False

    @property
    def several(self) -> bool:
        """Whether it takes several words."""
        return "list[" in self.kind

    def read(self, text: str) -> Any:
        """The value that a word stands for."""
        word = self.kind.removeprefix("None | ").partition(" ")[0].partition("[")[0]
        or_text = word == "dict" and " str" in self.kind and not self.name.endswith("_kwargs")
        if word not in _READERS or (or_text and not text.startswith("{")):
            return text
        reader, what = _READERS[word]
        try:
            return reader(text)
        except (KeyError, TypeError, ValueError, RecursionError):
            raise argparse.ArgumentTypeError(f"{text!r:.60} is not {what}") from None

    def check(self, value: Any) -> None:
        """Raise ProConError for a value that it cannot have."""
        if self.choices:
            check_choice(self.name, value, self.choices)
        if type(value) in (int, float):
            below = _BELOW.get(self.name, 2**63)
            if not value >= self.least:
                raise ProConError(f"{self.name} is {value}: give {self.least:g} or more")
            if not value < below:
                raise ProConError(f"{self.name} is {value!s:.40}: give less than {below}")

    def find(self, value: Any) -> None:
        """Raise ProConError if what it names is not there."""
        if self.reads == "model":
            check_name(value)
        elif self.reads:
            for path in value if isinstance(value, list) else [value]:
                may_be_on_the_hub = self.reads == "data" and Path(path).suffix.lower() not in DATA_SUFFIXES
                if not may_be_on_the_hub and not os.path.exists(path):
                    raise ProConError(f"{self.name} {path!r} does not exist: check the path")


@cache
def settings_of(name: str) -> dict[str, Setting]:
    """All settings of a command, by their names."""
    found = [_of_field(each) for each in fields(COMMANDS[name].arguments)]
    if name == "train":  # its function takes a ProConConfig, too
        for each in fields(ProConSettings):
            found.append(_of_field(each, "procon_", group="constraint", choices=CHOICES.get(each.name, ())))
        found += _training_arguments()
    # What all commands have comes last.
    found.sort(key=lambda setting: setting.group in (arguments.LOADING, arguments.CHAT))
    found.append(Setting("config", "str", None, "Settings by name.", "other", reads="file"))
    return {setting.name: setting for setting in found}


def _of_field(each: Field[Any], prefix: str = "", **about: Any) -> Setting:
    required = each.default is MISSING
    default = None if required else each.default
    return Setting(prefix + each.name, str(each.type), default, required=required, **each.metadata, **about)


def _training_arguments() -> Iterator[Setting]:
    """Those of the installed TrainingArguments, read in their source, as importing them takes seconds."""
    found = find_spec("transformers")
    if found is None or not found.submodule_search_locations:
        return
    source = Path(found.submodule_search_locations[0], "training_args.py").read_text(encoding="utf-8")
    classes = [item for item in ast.parse(source).body if isinstance(item, ast.ClassDef)]
    (body,) = [item.body for item in classes if item.name == "TrainingArguments"]
    for part in body:
        if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name) and isinstance(part.value, ast.Call):
            name = part.target.id
            values = {word.arg: _literal(word.value) for word in part.value.keywords}
            default = _DEFAULTS.get(name, values.get("default"))
            is_negative = isinstance(default, int | float) and default < 0
            least: dict[str, Any] = {} if is_negative else {"least": int(name in _FROM_1)}
            text = (values.get("metadata") or {}).get("help", "")
            yield Setting(name, ast.unparse(part.annotation), default, text, _TITLES.get(name, ""), **least)


def _literal(node: ast.expr) -> Any:
    """The value of an expression; None if it is computed."""
    try:
        return ast.literal_eval(node)
    except ValueError:
        return None


class _Parser(argparse.ArgumentParser):
    """One whose namespace has what was given, and no defaults."""

    def __init__(self, name: str) -> None:
        command = COMMANDS[name]
        super().__init__(
            f"procon {name}",
            usage=f"procon {name} {' '.join(word.upper() for word in command.words)} [settings]",
            description=command.arguments.__doc__,
            epilog=_NOTES,
            argument_default=argparse.SUPPRESS,
            allow_abbrev=False,
            formatter_class=partial(argparse.HelpFormatter, max_help_position=34),
        )
        self.settings = settings_of(name)
        titles = dict.fromkeys(setting.group for setting in self.settings.values())
        groups = {title: self.add_argument_group(title) for title in titles}
        for setting in self.settings.values():
            self._add(groups[setting.group], setting)
        for word in command.words:
            self.add_argument(word, nargs="*" if self.settings[word].several else "?", help=argparse.SUPPRESS)

    def _add(self, section: Any, setting: Setting) -> None:
        text, default = setting.help, setting.default
        if setting.required:
            text += " (required)"
        elif default not in (None, False):
            text += f" (default: {default})"
        further: dict[str, Any] = {"metavar": "{" + ",".join(setting.choices) + "}" if setting.choices else "VALUE"}
        if setting.several:
            further["nargs"] = "+"
        elif setting.kind.startswith("bool"):
            further |= {"nargs": "?", "const": True, "metavar": "{true,false}"}
        text = text.replace("%", "%%") if setting.group else argparse.SUPPRESS
        section.add_argument(f"--{setting.name}", type=setting.read, help=text, **further)

    def error(self, message: str) -> NoReturn:
        """argparse's own prints the usage too, and ends the process."""
        raise ProConError(f"{message}; see '{self.prog} --help'")

    def given(self, argv: Iterable[str]) -> dict[str, Any]:
        """The settings among these words, by their names."""
        plain = [_underscored(word) for word in argv]
        found, unknown = self.parse_known_args(plain)
        if unknown:
            close = get_close_matches(unknown[0].lstrip("-").partition("=")[0], self.settings, n=1)
            hint = f"; did you mean '--{close[0]}'?" if close else f": see '{self.prog} --help'"
            raise ProConError(f"there is no setting {unknown[0]!r:.80}{hint}")
        values = vars(found)
        for name, value in values.items():
            if isinstance(value, list) and len(value) == 1 and not self.settings[name].kind.startswith("list"):
                values[name] = value[0]
        return values

    def given_in(self, file: Path) -> dict[str, Any]:
        """The settings in a YAML file, which are read as flags are."""
        import yaml

        words: list[str] = []
        try:
            settings = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
            if not isinstance(settings, dict):
                raise ValueError("it holds no 'name: value' lines")
            for name, value in settings.items():
                values = list(map(_word, value if isinstance(value, list) else [value]))
                setting = self.settings.get(str(name).replace("-", "_"))
                if value is not None:
                    words += [f"--{name}", *values] if setting and setting.several else [f"--{name}={','.join(values)}"]
        except Exception as error:  # PyYAML has errors of its own, and lets through those of Python's types
            raise ProConError(
                f"config file {str(file)!r} cannot be read as YAML: {error or type(error).__name__}"
            ) from error
        return self.given(words)


def _underscored(word: str) -> str:
    name, equals, value = word.partition("=")
    return name.replace("-", "_").replace("__", "--", 1) + equals + value if re.match("--[a-zA-Z]", word) else word


def parse(name: str, argv: Sequence[str], *, look: bool = True) -> tuple[Any, ...]:
    """The arguments of command ``name``, and a ProConConfig if it trains; flags win over ``--config FILE.yaml``.

    Args:
        look: whether the files and models that the settings name must be there.

    Raises:
        ProConError: for a setting that is unknown, missing or malformed, or an unreadable YAML file.
    """
    command, parser = COMMANDS[name], _Parser(name)
    given = parser.given(argv)
    if "config" in given:
        parser.settings["config"].find(file := given.pop("config"))
        given = parser.given_in(Path(file)) | given
    missing = [f"--{each.name}" for each in parser.settings.values() if each.required and each.name not in given]
    if missing:
        parser.error(f"the following arguments are required: {', '.join(missing)}")
    for setting in parser.settings.values():
        if given.get(setting.name) is not None:
            setting.check(given[setting.name])
            if look:
                setting.find(given[setting.name])
    names = [each.name for each in fields(command.arguments) if each.name in given]
    own = command.arguments(**{name: given.pop(name) for name in names})
    if name != "train":
        return (own,)
    if own.eval_data or own.eval_split:
        given.setdefault("eval_strategy", "steps" if "eval_steps" in given else "epoch")
    config = import_module("procon.training").ProConConfig
    try:
        return own, config(**{**_DEFAULTS, **given})
    except ProConError:
        raise
    except Exception as error:  # TrainingArguments checks some settings itself, and trips over others
        raise ProConError(f"{error or type(error).__name__}; see 'procon {name} --help'") from error


def _word(value: Any) -> str:
    """As a flag has it; ``no`` too, which YAML reads as false."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return json.dumps(value) if isinstance(value, dict) else str(value)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, or 2 for bad input, reported in one line on standard error."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] in (["--version"], ["-V"]):
        print(f"procon {__version__}")
        return 0
    if not argv or argv in (["-h"], ["--help"], ["help"]):
        print(_overview())
        return 0
    if argv[0] == "help":
        argv = [argv[1], "--help"]
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            _run(argv[0], argv[1:])
    except ProConError as error:
        # From a loader's worker the message comes back behind the worker's own traceback.
        text = str(error).rpartition("ProConError: ")[2]
        print(f"procon: error: {' '.join(text.split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        going_on = "; procon train --resume goes on from its last checkpoint" if argv[0] == "train" else ""
        print(f"procon: interrupted{going_on}", file=sys.stderr)
        return 130
    return 0


def _run(name: str, argv: list[str]) -> None:
    if name not in COMMANDS:
        close = get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else f": choose one of {', '.join(COMMANDS)}"
        raise ProConError(f"there is no command {name!r}{hint}")
    if {"-h", "--help"} & set(argv):
        print(_Parser(name).format_help(), end="")
        return
    try:
        require_extra("cli", f"procon {name}")
        parsed = parse(name, argv)
        module, _, function = COMMANDS[name].function.rpartition(".")
        getattr(import_module(f"procon.cli.{module}"), function)(*parsed)
    except OSError as error:  # what the system refused, if no other check saw it coming
        what = f"{str(error.filename)!r} cannot be read or written" if error.filename else "the system refuses"
        raise ProConError(
            f"{what} ({error.strerror or error or type(error).__name__}): change that and run it again"
        ) from error


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    """In place of ``warnings.showwarning``: one line, of what is for users."""
    if issubclass(category, UserWarning):
        print(f"warning: {' '.join(printable(str(message)).split())}", file=sys.stderr)


def _overview() -> str:
    commands = "\n".join(f"  {name:<12}{command.arguments.__doc__}" for name, command in COMMANDS.items())
    return (
        "usage: procon COMMAND [settings]\n\n"
        f"Fine-tune a chat model without it forgetting how to refuse.\n\ncommands:\n{commands}\n\n"
        "Begin with `procon quickstart`. Each command explains its settings: procon help COMMAND"
    )
