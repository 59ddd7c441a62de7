"""Which tokens of a conversation did the assistant write? By the template's own marks, by TRL's, or by prefixes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from procon.chat.template import Message, apply_template, default_template, ids_of, template_kwargs
from procon.chat.thinking import Markers, thinking_markers
from procon.errors import ProConError
from procon.settings import ChatSettings

_MARKED = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")

#: The training template that TRL has for a template, by that template: finding it renders a few conversations.
_TRAINING_TEMPLATES: dict[str, str | None] = {}


def response_mask(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    chat: ChatSettings | None = None,
) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation, and for each token whether the assistant wrote it.

    1. If the chat template marks what the assistant says (``{% generation %}``), its marks are taken.
    2. If TRL is installed and has a training template for this one, that template's.
    3. Otherwise an assistant turn is what the template adds to the rendered conversation before it. A token that joins
       the end of a prompt and the start of a reply counts as the reply's.

    What the prompt ends with before a reply, such as the line feed after a role, is not the assistant's, even if the
    template marks it. Neither is a thought that is empty, as templates write it if thinking is off. A last turn with
    ``"prefix": True`` is the beginning of a reply: what the template writes after it is left out.

    Args:
        tools: that the assistant may call, as the template takes them.
        chat: variables of the template. Its system prompt is for what is asked, not for training data.

    Raises:
        ProConError: if turns cannot be separated, as the template rewrites earlier ones; or if it leaves out what the
            assistant says, or its tool calls.
    """
    kwargs = template_kwargs(tokenizer, chat) | ({"tools": list(tools)} if tools else {})
    template, markers = marked_template(tokenizer), thinking_markers(tokenizer, chat)
    if template is not None:
        kwargs["chat_template"] = template
    text = apply_template(tokenizer, messages, kwargs)
    if template is None:
        ids, mask = _by_prefix(tokenizer, messages, kwargs, text)
    else:
        ids, mask = _by_marks(tokenizer, messages, kwargs, text, markers)
    if messages and messages[-1].get("prefix"):
        begun = apply_template(tokenizer, messages, kwargs, continue_final_message=True)
        end = _common_prefix(ids, ids_of(tokenizer, begun))
        ids, mask = ids[:end], mask[:end]
    mask = _without_empty_thoughts(tokenizer, ids, mask, markers)
    said = str(tokenizer.decode([token for token, keep in zip(ids, mask, strict=True) if keep]))
    for message in messages:
        if message["role"] == "assistant":
            _check_rendered(tokenizer, message, text, said)
    return ids, mask


def marked_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The tokenizer's chat template if it marks what the assistant says, else TRL's for training; None if neither."""
    template = default_template(tokenizer)
    if _MARKED.search(template):
        return template
    if template not in _TRAINING_TEMPLATES:
        _TRAINING_TEMPLATES[template] = _of_trl(tokenizer)
    return _TRAINING_TEMPLATES[template]


def _of_trl(tokenizer: PreTrainedTokenizerBase) -> str | None:
    try:
        from trl.chat_template_utils import get_training_chat_template
    except ImportError:
        return None
    try:
        return get_training_chat_template(tokenizer)
    except Exception:  # it has none, or renders what this template does not take
        return None


def _by_marks(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    kwargs: Mapping[str, Any],
    text: str,
    markers: Sequence[Markers],
) -> tuple[list[int], list[bool]]:
    found = apply_template(
        tokenizer, messages, kwargs, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, mask = found["input_ids"], [keep == 1 for keep in found["assistant_masks"]]
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = apply_template(tokenizer, messages[:index], kwargs, add_generation_prompt=True)
        if not text.startswith(prompt):  # up to a thought that only the prompt opens or leaves out
            earlier = apply_template(tokenizer, messages[:index], kwargs) if index else ""
            opening = _common_prefix(earlier, prompt)
            marks = [prompt.find(mark, opening) for pair in markers for mark in pair if mark]
            prompt = prompt[: min((at for at in marks if at >= 0), default=len(prompt))]
        start = _common_prefix(ids, ids_of(tokenizer, prompt))
        if mask[start : start + 1] == [True]:
            while start > 0 and mask[start - 1]:
                start -= 1
                mask[start] = False
    return ids, mask


def _by_prefix(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], kwargs: Mapping[str, Any], text: str
) -> tuple[list[int], list[bool]]:
    ids = ids_of(tokenizer, text)
    mask = [False] * len(ids)
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = apply_template(tokenizer, messages[:index], kwargs, add_generation_prompt=True)
        after = apply_template(tokenizer, messages[: index + 1], kwargs)
        if not (after.startswith(before) and text.startswith(after)):
            raise ProConError(
                f"the chat template of {tokenizer.name_or_path!r} rewrites earlier turns, or opens replies with text "
                "that it does not keep, so response tokens cannot be found: install TRL, which has training templates "
                "of many families, keep one assistant turn a sample, or set tokenizer.chat_template to one that has "
                "{% generation %} around what the assistant says"
            )
        # Not the lengths: a tokenizer may join characters across the boundary, such as the line feed that ends a
        # prompt and one that begins the reply.
        start, end = (_common_prefix(ids, ids_of(tokenizer, part)) for part in (before, after))
        mask[start:end] = [True] * (end - start)
    return ids, mask


def _common_prefix(first: Sequence[Any], second: Sequence[Any]) -> int:
    pairs = zip(first, second, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def _without_empty_thoughts(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], mask: list[bool], markers: Sequence[Markers]
) -> list[bool]:
    thoughts = [rf"{re.escape(start)}\s*{re.escape(end)}" for start, end in markers if start]
    empty, kept = re.compile(rf"\s*(?:{'|'.join(thoughts)})\s*"), list(mask)
    starts = [at for at, keep in enumerate(mask) if keep and not (at and mask[at - 1])]
    for start in starts if thoughts else ():
        end = mask.index(False, start) if False in mask[start:] else len(mask)
        if found := empty.match(str(tokenizer.decode(ids[start:end]))):
            for at in range(start, end):
                if len(str(tokenizer.decode(ids[start : at + 1]))) > found.end():
                    break
                kept[at] = False
    return kept


def _check_rendered(tokenizer: PreTrainedTokenizerBase, message: Message, text: str, said: str) -> None:
    """Raise ProConError if a template for other conversations, such as ones with images, leaves out what is said."""
    left_out = [word for word in (message.get("content") or "").split()[-1:] if word not in text]
    names = [str((call.get("function") or call).get("name")) for call in message.get("tool_calls") or ()]
    left_out += [name for name in names if name not in said]
    if left_out:
        raise ProConError(
            f"the chat template of {tokenizer.name_or_path!r} leaves out what the assistant says or calls "
            f"({left_out[0]!r:.60}): set tokenizer.chat_template to one that has it, or leave such samples out"
        )
