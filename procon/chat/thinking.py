"""Thoughts and replies: what begins a thought, what ends it, and what a model then says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from procon.chat.template import default_template
from procon.settings import ChatSettings


class Markers(NamedTuple):
    """What begins a thought and what ends it; a thought without a beginning begins with the reply."""

    start: str
    end: str


#: Of model families. gpt-oss thinks in the channels "analysis" and "commentary", and answers in "final".
KNOWN_MARKERS = (
    Markers("<think>", "</think>"),  # DeepSeek-R1, Qwen3, Nemotron 3, GLM 4.5, SmolLM3, LFM 2.5
    Markers("<|channel|>analysis", "<|channel|>final<|message|>"),  # gpt-oss
    Markers("<|channel>thought", "<channel|>"),  # Gemma 4
    Markers("<|START_THINKING|>", "<|END_THINKING|>"),  # Cohere Command A Reasoning
    Markers("[THINK]", "[/THINK]"),  # Magistral
    Markers("<seed:think>", "</seed:think>"),  # Seed-OSS
    Markers("◁think▷", "◁/think▷"),  # Kimi
    Markers("<thought>", "</thought>"),  # EXAONE Deep
    Markers("to=self<|message|>", "to=user<|message|>"),  # Muse
)


class Reply(NamedTuple):
    """What a model generated.

    Attributes:
        text: the reply itself, without special tokens; empty if the thought did not end.
        thought: what was thought before; empty if nothing was.
        finished: whether the thought, if there was one, ended within its budget. If it did not, there is no reply yet:
            neither a refusal nor compliance.
        ended: whether it surely came to its end within the tokens that it had, of a thought and of a reply together.
    """

    text: str
    thought: str = ""
    finished: bool = True
    ended: bool = True


def thinking_markers(tokenizer: PreTrainedTokenizerBase, chat: ChatSettings | None = None) -> tuple[Markers, ...]:
    """The markers from ``chat``, or every known pair whose end stands in the chat template or the vocabulary."""
    if chat is not None and chat.thinking_markers:
        *start, end = chat.thinking_markers
        return (Markers(start[0] if start else "", end),)
    added: dict[str, int] = getattr(tokenizer, "added_tokens_encoder", {})
    template = default_template(tokenizer)
    return tuple(markers for markers in KNOWN_MARKERS if markers.end in template or markers.end in added)


def opens_thought(prompt: str, markers: Sequence[Markers]) -> bool:
    """Whether a rendered prompt ends within a thought, so that what follows begins with one."""
    end = prompt.rstrip()
    return any(not each.start or end.endswith(each.start) for each in markers)


def split_thoughts(text: str, markers: Sequence[Markers] = KNOWN_MARKERS, *, opened: bool = False) -> Reply:
    """The reply in a generated text, whose markers must still be there, and the thoughts before and within it.

    Args:
        opened: whether the prompt has begun a thought already.
    """
    thoughts: list[str] = []
    for start, end in markers:
        begin, stop = text.find(start) if start else -1, text.find(end)
        if stop >= 0 and not 0 <= begin < stop:  # begun in the prompt, or by a token that got lost
            thoughts.append(text[:stop])
            text, opened = text[stop + len(end) :], False
        while start and (begin := text.find(start)) >= 0:
            stop = text.find(end, begin)
            if stop < 0:
                return Reply("", _joined(thoughts, text[begin + len(start) :]), finished=False)
            thoughts.append(text[begin + len(start) : stop])
            text, opened = text[:begin] + text[stop + len(end) :], False
    if opened:
        return Reply("", _joined(thoughts, text), finished=False)
    return Reply(text.strip(), _joined(thoughts))


def _joined(thoughts: Sequence[str], last: str = "") -> str:
    return "\n".join(filter(None, (thought.strip() for thought in (*thoughts, last))))
