"""Conversations as token ids, through the tokenizer's own chat template, with thinking switched off if it can be."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from procon.errors import ProConError
from procon.settings import ChatSettings

#: ``role`` and ``content``, both texts; and what else a turn may have, such as ``tool_calls``.
Message = dict[str, Any]

#: Variables by which templates switch thinking, and the values for as little as the model can. Only the first that a
#: template reads is set. Of several values it is the first that stands in the template, or the last.
_SWITCHES: dict[str, tuple[Any, ...]] = {
    "enable_thinking": (False,),  # Qwen3, Gemma 4, GLM 4.5, Nemotron 3, SmolLM3
    "thinking": (False,),  # DeepSeek V3.1, Granite 3.2, Kimi K2
    "thinking_budget": (0,),  # Seed-OSS
    "reasoning_effort": ("none", "low"),  # Mistral; gpt-oss, which cannot do without
    "reasoning_strength": ("low",),  # Muse
}


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
    return ids_of(tokenizer, render_text(tokenizer, messages, chat, add_generation_prompt=generation_prompt))


def render_text(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], chat: ChatSettings | None, **settings: Any
) -> str:
    """The text that :func:`render` makes token ids of."""
    if chat is not None and chat.system_prompt is not None and (not messages or messages[0]["role"] != "system"):
        messages = [{"role": "system", "content": chat.system_prompt}, *messages]
    return apply_template(tokenizer, messages, template_kwargs(tokenizer, chat), **settings)


def apply_template(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], kwargs: Mapping[str, Any], **settings: Any
) -> Any:
    """transformers' ``apply_chat_template``; a text unless ``settings`` say otherwise.

    Raises:
        ProConError: if the tokenizer has no chat template, or its template rejects the conversation.
    """
    if not tokenizer.chat_template:
        raise ProConError(
            f"tokenizer of {tokenizer.name_or_path!r} has no chat template: set tokenizer.chat_template, or start "
            "from the model's chat (-Instruct) version"
        )
    template = kwargs.get("chat_template") or default_template(tokenizer)
    if _reads_parts(template, tuple(tokenizer.special_tokens_map.items())):
        messages = [*map(_in_parts, messages)]
    try:
        return tokenizer.apply_chat_template(list(messages), **{"tokenize": False, **settings}, **kwargs)
    except Exception as error:  # templates raise jinja2 errors of their own making
        raise ProConError(f"the chat template of {tokenizer.name_or_path!r} rejects a conversation: {error}") from error


@lru_cache(maxsize=32)
def _reads_parts(template: str, special_tokens: tuple[tuple[str, Any], ...]) -> bool:
    """Whether a message's content has to be a list of parts, as for many vision-language models.

    Their templates go through a plain text letter by letter, and say nothing of it.

    Raises:
        ProConError: if what a user says is not in what the template makes of it, in either form.
    """
    said = "Is 7 more than 5?"
    for parts in (False, True):
        (message,) = user_turn(said)
        try:
            turns = [_in_parts(message) if parts else message]
            (text,), _ = render_jinja_template([turns], chat_template=template, **dict(special_tokens))
        except Exception:  # what it needs besides, rendering a conversation says
            return False
        if said in text:
            return parts
    raise ProConError("the chat template leaves out what a user says: set tokenizer.chat_template to the model's own")


def _in_parts(message: Message) -> Message:
    content = message.get("content")
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


def template_kwargs(tokenizer: PreTrainedTokenizerBase, chat: ChatSettings | None) -> dict[str, Any]:
    """Variables that the tokenizer's chat template is rendered with: those given, and thinking off if they are silent.

    Raises:
        ProConError: for one that the template does not read.
    """
    template = default_template(tokenizer)
    given: Mapping[str, Any] = {} if chat is None else chat.chat_template_kwargs
    for name in given:
        if name not in _variables(template):
            raise ProConError(
                f"chat_template_kwargs has {name!r}, which the chat template of {tokenizer.name_or_path!r} does not "
                "read: check the name, or leave it out"
            )
    return {**({} if given.keys() & _SWITCHES.keys() else thinking_off(template)), **given}


def thinking_off(template: str) -> dict[str, Any]:
    """What to give the template so that the model thinks as little as it can; nothing if there is no switch."""
    for name, values in _SWITCHES.items():
        if name in _variables(template):
            known = (value for value in values[:-1] if re.search(f"['\"]{value}['\"]", template))
            return {name: next(known, values[-1])}
    return {}


@lru_cache(maxsize=32)
def _variables(template: str) -> frozenset[str]:
    """Names that a template reads before it sets them itself, by their lines; a caller can set these."""
    plain = re.sub(r"\{%[-+]?\s*(?:end)?generation\s*[-+]?%\}", "", template)
    try:
        tree = jinja2.Environment(extensions=[jinja2.ext.loopcontrols], autoescape=False).parse(plain)  # noqa: S701
    except jinja2.TemplateError:  # rendering says so
        return frozenset()
    read: dict[str, int] = {}
    own: dict[str, int] = {}
    for name in tree.find_all(nodes.Name):
        (read if name.ctx == "load" else own).setdefault(name.name, name.lineno)
    return frozenset(name for name, line in read.items() if line <= own.get(name, line))


def default_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template; of several by name, the default one; nothing if there is none."""
    template: Any = tokenizer.chat_template
    return (template.get("default", "") if isinstance(template, dict) else template) or ""


def describe_chat(tokenizer: PreTrainedTokenizerBase | None, chat: ChatSettings | None) -> dict[str, Any]:
    """How a model is asked, for provenance: the system prompt and all variables of the template."""
    has_template = tokenizer is not None and getattr(tokenizer, "chat_template", None)
    return {
        "system_prompt": None if chat is None else chat.system_prompt,
        "template_kwargs": template_kwargs(tokenizer, chat) if tokenizer is not None and has_template else {},
    }


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
