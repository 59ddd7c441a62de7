"""The turns of a conversation, however a data set writes them: texts, parts, tool calls; role or from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from procon.errors import ProConError
from procon.files import MAX_TEXT

#: ``role`` and ``content``, and what of :data:`MORE` it has.
Turn = dict[str, Any]

#: What a turn may have beside its role and its content, and templates render.
MORE = ("tool_calls", "tool_call_id", "name", "reasoning_content", "reasoning", "thinking")

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


def turns_of(row: Mapping[str, Any], column: str, role: str | None = None) -> list[Turn]:
    """The turns in a column, or, if a role is given, the one turn that a text in it is.

    Raises:
        ProConError: if something else is there.
    """
    value = row.get(column)
    if role is not None and not isinstance(value, list):
        return [{"role": role, "content": checked_text(value, column)}]
    if not isinstance(value, list) or not value:
        raise ProConError(f"{column} is {value!r:.60}: give a list of turns")
    return [_turn(turn, column) for turn in value]


def _turn(turn: object, column: str) -> Turn:
    if isinstance(turn, dict) and "from" in turn and "role" not in turn:
        turn = _of_sharegpt(turn)
    if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
        raise ProConError(f"a turn of {column} is {turn!r:.60}: give each a 'role' and a 'content', both texts")
    more = {name: turn[name] for name in MORE if turn.get(name)}
    if "tool_calls" in more:
        more["tool_calls"] = _calls(more["tool_calls"], column)
    for name in set(more) - {"tool_calls"}:
        checked_text(more[name], f"a {name} of {column}")
    content = turn.get("content")
    if content is None and "tool_calls" in more:
        content = ""
    if isinstance(content, list):
        content = "".join(_part(part, column) for part in content)
    if not isinstance(content, str):
        raise ProConError(f"a turn of {column} is {turn!r:.60}: give each a 'role' and a 'content', both texts")
    role = checked_text(turn["role"], f"a role of {column}")
    return {"role": role, "content": checked_text(content, f"a content of {column}"), **more}


def _of_sharegpt(turn: Mapping[str, Any]) -> dict[str, Any]:
    speaker, value = turn["from"], turn.get("value")
    if speaker == "function_call":
        return {"role": "assistant", "content": None, "tool_calls": _json(value, "a function_call")}
    role = _SPEAKERS.get(speaker, speaker) if isinstance(speaker, str) else speaker
    return {**turn, "role": role, "content": value}


def _part(part: object, column: str) -> str:
    """The text of a part of a content, of which lists of parts have several."""
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    raise ProConError(f"a content of {column} has the part {part!r:.60}: give texts alone")


def _calls(value: object, column: str) -> list[dict[str, Any]]:
    """Tool calls with arguments as templates take them: an object, not the text of one."""
    calls = _present(_json(value, f"tool_calls of {column}"))
    calls = [calls] if isinstance(calls, dict) else calls
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ProConError(f"tool_calls of {column} has {call!r:.60}: give each a 'function' with a 'name'")
        if isinstance(function.get("arguments"), str):
            try:
                arguments = json.loads(function["arguments"])
            except (ValueError, RecursionError):
                continue  # a text in the model's own words
            if isinstance(arguments, dict):
                function["arguments"] = arguments
    return [call if "function" in call else {"type": "function", "function": call} for call in calls]


def tools_of(value: object) -> list[Any] | None:
    """The tools that a conversation may call: a list, or its JSON; None if there are none.

    Raises:
        ProConError: if it is something else.
    """
    if not value:
        return None
    tools = _present(_json(value, "tools"))
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ProConError(f"tools is {value!r:.60}: give a list of objects, or its JSON")
    return tools or None


def _json(value: object, name: str) -> Any:
    """A value, or what its JSON says, of no more than a text's length."""
    try:
        text = value if isinstance(value, str) else json.dumps(value)
        checked_text(text, name)
        return json.loads(text)
    except (ValueError, TypeError, RecursionError) as error:
        if isinstance(error, ProConError):
            raise
        raise ProConError(f"{name} is {value!r:.60}: give JSON") from None


def _present(value: Any) -> Any:
    """Without what is None: tables have every key of any row in all of them."""
    if isinstance(value, dict):
        return {key: _present(each) for key, each in value.items() if each is not None}
    return [_present(each) for each in value] if isinstance(value, list) else value


def checked_text(value: object, name: str) -> str:
    """The text; ProConError if it is not a text, too long, or of half characters."""
    if not isinstance(value, str):
        raise ProConError(f"{name} is {value!r:.60}: give a text")
    if len(value) > MAX_TEXT:
        raise ProConError(f"{name} has {len(value)} characters: give at most {MAX_TEXT}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ProConError(f"{name} has half of a surrogate pair: give a text of whole characters") from None
    return value
