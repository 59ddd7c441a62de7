"""The flags about how a model is spoken to, as they are in several commands; free of heavy imports."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any, Protocol

from procon.errors import ProConError
from procon.settings import ChatSettings

_SENTENCES = {field.name: field.metadata["help"] for field in fields(ChatSettings)}

SYSTEM_PROMPT = _SENTENCES["system_prompt"]
CHAT_TEMPLATE_KWARGS = _SENTENCES["chat_template_kwargs"] + " A JSON object."
THINKING_MARKERS = _SENTENCES["thinking_markers"] + " Joined by a comma."
THINKING_TOKENS = _SENTENCES["thinking_tokens"]


class HasChat(Protocol):
    """Arguments of a command that asks a model."""

    system_prompt: str | None
    chat_template_kwargs: dict | str | None


def chat_settings(arguments: HasChat) -> ChatSettings:
    """What the flags say.

    Raises:
        ProConError: for a value that a setting cannot have.
    """
    kwargs: Any = arguments.chat_template_kwargs or {}
    if isinstance(kwargs, str):
        try:
            kwargs = json.loads(kwargs)
        except (ValueError, RecursionError):
            kwargs = None
        if not isinstance(kwargs, dict):
            raise ProConError(
                f"chat_template_kwargs is {arguments.chat_template_kwargs!r:.60}: give a JSON object, such as "
                """'{"enable_thinking": false}'"""
            )
    markers = getattr(arguments, "thinking_markers", None)  # which commands that generate nothing do not have
    parts = tuple(part.strip() for part in markers.split(",")) if markers else ()
    tokens = getattr(arguments, "thinking_tokens", ChatSettings.thinking_tokens)
    return ChatSettings(arguments.system_prompt, kwargs, parts, tokens)
