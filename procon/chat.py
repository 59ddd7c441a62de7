"""Conversations as token ids, through the tokenizer's own chat template."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from procon.errors import ProConError

Message = dict[str, str]


def user_turn(instruction: str) -> list[Message]:
    """A conversation of one user message."""
    return [{"role": "user", "content": instruction}]


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, generation_prompt: bool) -> list[int]:
    """Token ids of ``messages``; with ``generation_prompt``, ending where the assistant is to speak.

    Raises:
        ProConError: if the tokenizer has no chat template, or its template rejects the conversation.
    """
    if not tokenizer.chat_template:
        raise ProConError(
            f"tokenizer of {tokenizer.name_or_path!r} has no chat template: set tokenizer.chat_template, or start "
            "from the model's chat (-Instruct) version"
        )
    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=generation_prompt)
    except Exception as error:  # templates raise jinja2 errors of their own making
        raise ProConError(f"the chat template of {tokenizer.name_or_path!r} rejects a conversation: {error}") from error
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def response_mask(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation, and for each token whether the assistant wrote it.

    An assistant turn is what the template adds to the rendered conversation before it, so no per-family markers
    are needed.

    Raises:
        ProConError: if the template rewrites earlier turns, so that turns cannot be told apart.
    """
    ids = render(tokenizer, messages, generation_prompt=False)
    mask = [False] * len(ids)
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render(tokenizer, messages[:index], generation_prompt=True)
        after = render(tokenizer, messages[: index + 1], generation_prompt=False)
        if ids[: len(before)] != before or ids[: len(after)] != after:
            raise ProConError(
                f"the chat template of {tokenizer.name_or_path!r} rewrites earlier turns, so the response tokens of "
                "a conversation with several assistant turns cannot be found: keep one assistant turn a sample"
            )
        mask[len(before) : len(after)] = [True] * (len(after) - len(before))
    return ids, mask


def template_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """A short hash of the chat template, for provenance."""
    return hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()[:16]


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The tokenizer's padding id, or its end-of-text id where it has none (padding is masked out everywhere)."""
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return token_id
    return 0
