"""What a row of a data set says, however its columns are called and its turns are written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from procon.errors import ProConError

#: What a user may say a column is.
_ROLES = ("messages", "prompt", "response", "system", "tools")

#: Columns of a question and of its answer, as data sets have them; the first that are there are taken.
_PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
)

#: What a turn may have beside its role and its content: what templates render, and whether it is a reply's beginning.
_MORE = ("tool_calls", "tool_call_id", "name", "reasoning_content", "reasoning", "thinking", "prefix")

#: Who speaks, in ShareGPT's words.
_SPEAKERS = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "assistant",
}


def parse_columns(text: str | None) -> dict[str, str]:
    """``prompt=question,response=answer`` as what each column is and what it is called.

    Raises:
        ProConError: for anything else.
    """
    pairs = [part.partition("=") for part in str(text or "").split(",") if text]
    columns = {role.strip(): name.strip() for role, _, name in pairs}
    if len(columns) < len(pairs) or "" in columns.values() or not columns.keys() <= set(_ROLES):
        raise ProConError(
            f"data_columns is {text!r:.60}: give prompt=NAME,response=NAME, or messages=NAME; and system and tools"
        )
    return columns


def sample_of(row: Any, where: str, columns: Mapping[str, str] | None = None) -> dict[str, Any]:
    """``messages``, the turns of a conversation, and ``tools``, those that it may call or None.

    Args:
        where: how a message calls the row.
        columns: what the columns are called if not as in the known formats.

    Raises:
        ProConError: if the row is no conversation in a known format.
    """
    try:
        if None in row:  # cells beyond the columns of a CSV file
            raise ValueError("more cells than columns")
        if columns:
            row = {
                role: row[name] if role in ("prompt", "response") else row.get(name) for role, name in columns.items()
            }
        messages, tools, system = _turns(row), _json(row.get("tools") or []), row.get("system")
        if system and system.strip() and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system}, *messages]
        texts = [text for turn in messages for name, text in turn.items() if name not in ("tool_calls", "prefix")]
        if not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError("a role or a content is no text")
        if not all(isinstance(tool, dict) for tool in tools):
            raise ValueError("tools are no list of objects")
    except (AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise ProConError(
            f"{where} is no conversation ({reason!s:.80}) but {row!r:.80}: give 'messages' or 'conversations', turns "
            "with 'role' and 'content' or 'from' and 'value'; or 'prompt' + 'completion' or 'response'; 'instruction' "
            "(+ 'input') + 'output' or 'response'; 'question' + 'answer'; or say what the columns are with data_columns"
        ) from None
    return {"messages": messages, "tools": tools or None}


def _turns(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    for column in ("messages", "conversations"):
        if column in row:
            return [_turn(turn) for turn in row[column]]
    for question, answer in _PAIRS:
        if question in row and answer in row:
            turns = _side(row[question], "user")
            more = [row[name] for name in ("input", "context") if question == "instruction" and row.get(name)]
            turns[-1]["content"] = "\n\n".join([turns[-1]["content"], *more])
            return turns + _side(row[answer], "assistant")
    raise ValueError(f"its columns are {sorted(row)}")


def _side(value: Any, role: str) -> list[dict[str, Any]]:
    """The question or the answer of a pair: a text, or turns."""
    return [_turn(turn) for turn in value] if isinstance(value, list) else [{"role": role, "content": value}]


def _turn(turn: Mapping[str, Any]) -> dict[str, Any]:
    more = {name: turn[name] for name in _MORE if turn.get(name)}
    if "role" in turn:
        role, content = turn["role"], turn.get("content")
    else:
        role, content = _SPEAKERS.get(turn["from"], turn["from"]), turn.get("value")
        if turn["from"] == "function_call":
            more, content = {"tool_calls": content}, None
    if "tool_calls" in more:
        more["tool_calls"] = _calls(more["tool_calls"])
        content = content or ""
    if isinstance(content, list):
        content = "".join(part if isinstance(part, str) else part["text"] for part in content)
    return {"role": role, "content": content, **more}


def _calls(value: Any) -> list[dict[str, Any]]:
    """Tool calls with arguments as templates take them: an object, not the text of one."""
    calls = _json(value)
    calls = calls if isinstance(calls, list) else [calls]
    calls = [call if "function" in call else {"type": "function", "function": call} for call in calls]
    for function in (call["function"] for call in calls):
        if not isinstance(function["name"], str):
            raise ValueError("a tool call has no name")
        with suppress(KeyError, TypeError, ValueError):  # an object already, or a text in the model's own words
            if isinstance(arguments := json.loads(function["arguments"]), dict):
                function["arguments"] = arguments
    return calls


def _json(value: Any) -> Any:
    """A copy of a value, or what its JSON says, without what is None: tables have every key of any row in all rows."""
    return _present(json.loads(value if isinstance(value, str) else json.dumps(value)))


def _present(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _present(each) for key, each in value.items() if each is not None}
    return [_present(each) for each in value] if isinstance(value, list) else value
