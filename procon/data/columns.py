"""Which columns a data set has, what a row of them says, and how a user names other ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from procon.data.turns import Turn, checked_text, tools_of, turns_of
from procon.errors import ProConError

Row = Mapping[str, Any]

#: What a user may say a column is.
ROLES = ("messages", "prompt", "response", "system", "tools", "text")

#: Columns of a question and of its answer, as data sets have them; the first that are there are taken.
_PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
)

#: Columns that go on with the instruction.
_INPUTS = ("input", "context")

_CONVERSATIONS = ("messages", "conversations")

#: All columns that any of the known formats has.
COLUMNS = frozenset({*_CONVERSATIONS, *_INPUTS, *(name for pair in _PAIRS for name in pair), *ROLES})

FORMATS = (
    "'messages' or 'conversations', 'prompt' + 'completion' or 'response', 'instruction' (+ 'input') + 'output' or "
    "'response', 'question' + 'answer', or 'text'"
)


class Sample(NamedTuple):
    """What a row says: a conversation, with the tools that it may call; or a text."""

    messages: list[Turn] | None = None
    tools: list[Any] | None = None
    text: str | None = None


Converter = Callable[[Row], Sample]


def parse_columns(text: str | None) -> dict[str, str]:
    """``prompt=question,response=answer`` as what each column is and what it is called.

    Raises:
        ProConError: for anything else, or for columns that make no sample.
    """
    if text is not None and not isinstance(text, str):
        raise ProConError(f"data_columns is {text!r:.60}: give a text, such as prompt=NAME,response=NAME")
    columns: dict[str, str] = {}
    for part in text.split(",") if text else ():
        role, equals, name = (piece.strip() for piece in part.partition("="))
        if not equals or not name or role in columns:
            raise ProConError(f"data_columns has {part!r:.60}: give each column once, as prompt=NAME,response=NAME")
        columns[role] = name
    check_columns(columns)
    return columns


def check_columns(columns: Mapping[str, str]) -> None:
    """Raise ProConError unless these make a sample."""
    for role in columns:
        if role not in ROLES:
            raise ProConError(f"data_columns names a column {role!r:.60}: choose among {', '.join(ROLES)}")
    whole = [set(columns) & {"messages"}, set(columns) & {"text"}, {"prompt", "response"} <= set(columns)]
    if columns and sum(map(bool, whole)) != 1:
        raise ProConError(
            f"data_columns names {', '.join(columns)}: give messages, or prompt and response, or text; and system and "
            "tools beside the first two"
        )


def converter(columns: Iterable[str], name: str, called: Mapping[str, str] | None = None) -> Converter:
    """What makes a sample of a row that has these columns.

    Args:
        called: what the user says that they are.

    Raises:
        ProConError: if they are none of the known formats.
    """
    there = set(columns)
    if called:
        return _named(there, name, called)
    for column in _CONVERSATIONS:
        if column in there:
            return lambda row: Sample(_with_system(row, turns_of(row, column)), tools_of(row.get("tools")))
    for question, answer in _PAIRS:
        if {question, answer} <= there:
            more = _INPUTS if question == "instruction" else ()
            return lambda row: Sample(_pair(row, question, answer, more), tools_of(row.get("tools")))
    if "text" in there:
        return lambda row: Sample(text=checked_text(row.get("text"), "text"))
    raise ProConError(
        f"{name!r} has the columns {sorted(there)}; known formats are {FORMATS}: rename its columns, or say what they "
        "are with data_columns"
    )


def _named(there: set[str], name: str, called: Mapping[str, str]) -> Converter:
    check_columns(called)
    for column in called.values():
        if column not in there:
            raise ProConError(f"{name!r} has no column {column!r:.60}, but {sorted(there)}: name one of these")

    def convert(row: Row) -> Sample:
        # Under the names of the known formats, of which the row may have other columns.
        found = {role: row.get(column) for role, column in called.items()}
        if "text" in found:
            return Sample(text=checked_text(found["text"], called["text"]))
        tools = tools_of(found.get("tools"))
        if "messages" in found:
            return Sample(_with_system(found, turns_of(found, "messages")), tools)
        return Sample(_pair(found, "prompt", "response", ()), tools)

    return convert


def _pair(row: Row, question: str, answer: str, more: tuple[str, ...]) -> list[Turn]:
    turns = turns_of(row, question, "user")
    for text in (checked_text(row[name], name) for name in more if row.get(name)):
        turns[-1] = {**turns[-1], "content": f"{turns[-1]['content']}\n\n{text}"}
    return _with_system(row, turns + turns_of(row, answer, "assistant"))


def _with_system(row: Row, turns: list[Turn]) -> list[Turn]:
    system = row.get("system")
    if not isinstance(system, str) or not system.strip() or turns[0]["role"] == "system":
        return turns
    return [{"role": "system", "content": checked_text(system, "system")}, *turns]
