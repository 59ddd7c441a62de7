"""Conversations as token ids, through the tokenizer's own chat template."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from procon.chat.time_limit import time_limit
from procon.errors import ProConError

#: Seconds for one conversation: a template is a program that comes with the model, and may have loops.
LONGEST_RENDERING = 10.0

Message = dict[str, str]


def user_turn(instruction: str) -> list[Message]:
    """A conversation of one user message."""
    return [{"role": "user", "content": instruction}]


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, generation_prompt: bool) -> list[int]:
    """Token ids of ``messages``; with ``generation_prompt``, ending where the assistant is to speak.

    Raises:
        ProConError: if the tokenizer has no chat template, or its template rejects the conversation.
    """
    return _ids(tokenizer, _text(tokenizer, messages, generation_prompt))


def _text(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], generation_prompt: bool) -> str:
    if not tokenizer.chat_template:
        raise ProConError(
            f"tokenizer of {tokenizer.name_or_path!r} has no chat template: set tokenizer.chat_template, or start "
            "from the model's chat (-Instruct) version"
        )
    try:
        with time_limit(LONGEST_RENDERING):
            rendered = tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=generation_prompt
            )
    except TimeoutError as error:
        raise ProConError(
            f"the chat template of {tokenizer.name_or_path!r} needs more than {LONGEST_RENDERING:g} seconds for a "
            "conversation: set tokenizer.chat_template to one that ends"
        ) from error
    except Exception as error:  # templates raise jinja2 errors of their own making
        raise ProConError(f"the chat template of {tokenizer.name_or_path!r} rejects a conversation: {error}") from error
    return rendered  # pyright: ignore[reportReturnType]  # a text if tokenize is False


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def response_mask(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation, and for each token whether the assistant wrote it.

    An assistant turn is what the template adds to the rendered conversation before it, so no per-family markers
    are needed. A token that joins the end of a prompt and the start of a reply counts as the reply's.

    Raises:
        ProConError: if the template rewrites earlier turns, so that turns cannot be separated.
    """
    text = _text(tokenizer, messages, False)
    ids = _ids(tokenizer, text)
    mask = [False] * len(ids)
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _text(tokenizer, messages[:index], True)
        after = _text(tokenizer, messages[: index + 1], False)
        if not (after.startswith(before) and text.startswith(after)):
            raise ProConError(
                f"the chat template of {tokenizer.name_or_path!r} rewrites earlier turns, or opens replies with text "
                "that it does not keep, so response tokens cannot be found: keep one assistant turn a sample, or set "
                "tokenizer.chat_template to one that does neither"
            )
        # Not the lengths: a tokenizer may join characters across the boundary, such as the line feed that ends a
        # prompt and one that begins the reply.
        start, end = (_common_prefix(ids, _ids(tokenizer, part)) for part in (before, after))
        mask[start:end] = [True] * (end - start)
    return ids, mask


def _common_prefix(first: list[int], second: list[int]) -> int:
    pairs = zip(first, second, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def template_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """A short hash of the chat template, for provenance."""
    return hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()[:16]


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The tokenizer's padding id, or its end-of-text id if it has none (padding is masked out everywhere)."""
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return token_id  # pyright: ignore[reportReturnType]  # typed as for tokens, too
    return 0
