"""What a chat template can be asked for: the variables that it reads, and those that switch thinking off."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import jinja2
import jinja2.ext
from jinja2 import nodes
from transformers import PreTrainedTokenizerBase

from procon.errors import ProConError
from procon.settings import ChatSettings

#: Variables by which templates switch thinking, and the values for as little as the model can. Only the first that a
#: template reads is set. Efforts are tried in turn, as templates raise errors for those that they do not know.
SWITCHES: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("enable_thinking", (False,)),  # Qwen3, Gemma 4, GLM 4.5, Nemotron 3, SmolLM3
    ("thinking", (False,)),  # DeepSeek V3.1, Granite 3.2, Kimi K2
    ("thinking_budget", (0,)),  # Seed-OSS
    ("reasoning_effort", ("none", "low")),  # Mistral; gpt-oss, which cannot do without
    ("reasoning_strength", ("low",)),  # Muse
)


class _Reads(NamedTuple):
    """Of a template: names of the variables that a caller can set, and all texts that stand in it."""

    variables: frozenset[str]
    texts: frozenset[str]


@lru_cache(maxsize=32)
def _reads(template: str) -> _Reads | None:
    """None for what is no template; rendering it says so."""
    plain = re.sub(r"\{%[-+]?\s*(?:end)?generation\s*[-+]?%\}", "", template)
    try:
        tree = jinja2.Environment(extensions=[jinja2.ext.loopcontrols], autoescape=False).parse(plain)  # noqa: S701
    except jinja2.TemplateError:
        return None
    names = list(tree.find_all(nodes.Name))
    loaded, own = _first_lines(names, "load"), _first_lines(names, "store", "param")
    # A variable that the template sets is a caller's too if the template asks before whether it is there.
    asked = {test.node.name for test in tree.find_all(nodes.Test) if isinstance(test.node, nodes.Name)}
    asked |= {
        filtered.node.name
        for filtered in tree.find_all(nodes.Filter)
        if filtered.name in ("default", "d") and isinstance(filtered.node, nodes.Name)
    }
    texts = {constant.value for constant in tree.find_all(nodes.Const) if isinstance(constant.value, str)}
    variables = {name for name, line in loaded.items() if name not in own or (name in asked and line <= own[name])}
    return _Reads(frozenset(variables), frozenset(texts))


def _first_lines(names: list[nodes.Name], *contexts: str) -> dict[str, int]:
    lines: dict[str, int] = {}
    for name in names:
        if name.ctx in contexts:
            lines[name.name] = min(name.lineno, lines.get(name.name, name.lineno))
    return lines


def thinking_off(template: str) -> dict[str, Any]:
    """What to give the template so that the model thinks as little as it can; nothing if there is no switch."""
    reads = _reads(template)
    if reads is None:
        return {}
    for name, values in SWITCHES:
        if name in reads.variables:
            known = [value for value in values[:-1] if value in reads.texts]
            return {name: known[0] if known else values[-1]}
    return {}


def template_kwargs(tokenizer: PreTrainedTokenizerBase, chat: ChatSettings | None) -> dict[str, Any]:
    """Variables that the tokenizer's chat template is rendered with: those given, and thinking off if they are silent.

    Raises:
        ProConError: for one that the template does not read.
    """
    template = default_template(tokenizer)
    given: Mapping[str, Any] = {} if chat is None else chat.chat_template_kwargs
    reads = _reads(template)
    for name in given:
        if reads is not None and name not in reads.variables:
            raise ProConError(
                f"chat_template_kwargs has {name!r}, which the chat template of {tokenizer.name_or_path!r} does not "
                "read: check the name, or leave it out"
            )
    switches = {name for name, _ in SWITCHES}
    return {**({} if switches & given.keys() else thinking_off(template)), **given}


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
