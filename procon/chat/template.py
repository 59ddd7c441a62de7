"""Conversations as token ids, through the tokenizer's own chat template."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from procon.chat.switches import template_kwargs
from procon.chat.time_limit import time_limit
from procon.errors import ProConError
from procon.settings import ChatSettings

#: Seconds for one conversation: a template is a program that comes with the model, and may have loops.
LONGEST_RENDERING = 10.0

#: ``role`` and ``content``, both texts; and what else a turn may have, such as ``tool_calls``.
Message = dict[str, Any]


def user_turn(instruction: str) -> list[Message]:
    """A conversation of one user message."""
    return [{"role": "user", "content": instruction}]


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    generation_prompt: bool,
    chat: ChatSettings | None = None,
) -> list[int]:
    """Token ids of ``messages``; with ``generation_prompt``, ending where the assistant is to speak.

    Args:
        chat: the system prompt, for a conversation without one, and variables of the template; thinking is switched off
            if the template can and these do not say otherwise.

    Raises:
        ProConError: if the tokenizer has no chat template, or its template rejects the conversation.
    """
    return ids_of(tokenizer, render_text(tokenizer, messages, generation_prompt=generation_prompt, chat=chat))


def render_text(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    generation_prompt: bool,
    chat: ChatSettings | None = None,
) -> str:
    """What :func:`render` makes token ids of."""
    if chat is not None and chat.system_prompt is not None and (not messages or messages[0]["role"] != "system"):
        messages = [{"role": "system", "content": chat.system_prompt}, *messages]
    return apply_template(
        tokenizer, messages, template_kwargs(tokenizer, chat), add_generation_prompt=generation_prompt
    )


def apply_template(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], kwargs: Mapping[str, Any], **settings: Any
) -> Any:
    """transformers' ``apply_chat_template``, within a time; a text unless ``settings`` say otherwise.

    Raises:
        ProConError: if the tokenizer has no chat template, or its template rejects the conversation.
    """
    if not tokenizer.chat_template:
        raise ProConError(
            f"tokenizer of {tokenizer.name_or_path!r} has no chat template: set tokenizer.chat_template, or start "
            "from the model's chat (-Instruct) version"
        )
    try:
        with time_limit(LONGEST_RENDERING):
            return tokenizer.apply_chat_template(list(messages), **{"tokenize": False, **settings}, **kwargs)
    except TimeoutError as error:
        raise ProConError(
            f"the chat template of {tokenizer.name_or_path!r} needs more than {LONGEST_RENDERING:g} seconds for a "
            "conversation: set tokenizer.chat_template to one that ends"
        ) from error
    except Exception as error:  # templates raise jinja2 errors of their own making
        raise ProConError(f"the chat template of {tokenizer.name_or_path!r} rejects a conversation: {error}") from error


def ids_of(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a rendered text, without special tokens of the tokenizer's own adding."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def template_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """A short hash of the chat template, for provenance."""
    return hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()[:16]


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The tokenizer's padding id, or its end-of-text id if it has none (padding is masked out everywhere)."""
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return token_id  # pyright: ignore[reportReturnType]  # typed as for tokens, too
    return 0
