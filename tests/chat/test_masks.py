"""What the assistant wrote, and nothing else, under the templates of today's families; expectations are by hand."""

import importlib.resources
import sys

import pytest

from procon.chat import masks, response_mask
from procon.errors import ProConError
from procon.settings import ChatSettings

pytest.importorskip("trl", reason="TRL has the families' templates")

ONE = [{"role": "user", "content": "Q1?"}, {"role": "assistant", "content": "A1."}]
TWO = [*ONE, {"role": "user", "content": "Q2?"}, {"role": "assistant", "content": "A2."}]
CALL = {"type": "function", "id": "abcdefghi", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
WITH_TOOLS = [
    {"role": "user", "content": "1 + 2?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "name": "add", "content": "3", "tool_call_id": "abcdefghi"},
    {"role": "assistant", "content": "It is 3."},
]
NUMBERS = {name: {"type": "integer", "description": name} for name in "ab"}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Add.",
            "parameters": {"type": "object", "properties": NUMBERS, "required": ["a", "b"]},
        },
    }
]

_JSON_CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'
_XML_CALL = (
    "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n<parameter=b>\n2\n</parameter>\n</function>\n"
    "</tool_call>"
)
_LLAMA_CALL = '{"name": "add", "parameters": {"a": 1, "b": 2}}<|eot_id|>'
_DEEPSEEK_CALL = (
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n```json\n"  # noqa: RUF001
    '{"a": 1, "b": 2}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>'  # noqa: RUF001
)
_GLM_CALL = (
    "<tool_call>add\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n<arg_key>b</arg_key>\n<arg_value>2</arg_value>\n"
    "</tool_call>"
)
_CHATML, _DEEPSEEK, _END = "<|im_end|>\n", "<｜end▁of▁sentence｜>", "<eos>"  # noqa: RUF001

#: By TRL's name of the template: how a reply is written, how the last one is if otherwise, and the tool call; None for
#: a family whose template leaves tool calls out, "" for one that refuses tools.
FAMILIES: dict[str, tuple[str, str | None, str | None]] = {
    "llama3": ("{}<|eot_id|>", None, None),
    "llama3_1": ("{}<|eot_id|>", None, _LLAMA_CALL),
    "qwen2_5": ("{}" + _CHATML, None, _JSON_CALL + _CHATML),
    "qwen3": ("{}" + _CHATML, None, _JSON_CALL + _CHATML),
    "qwen3_instruct_2507": ("{}" + _CHATML, None, _JSON_CALL + _CHATML),
    "qwen3_5_think": ("{}" + _CHATML, None, _XML_CALL + _CHATML),
    "qwen3_5_nothink": ("{}" + _CHATML, None, _XML_CALL + _CHATML),
    "gptoss": (
        "<|channel|>final<|message|>{}<|end|>",
        "<|channel|>final<|message|>{}<|return|>",
        ' to=functions.add<|channel|>commentary json<|message|>{"a": 1, "b": 2}<|call|>',
    ),
    "phi3": ("{}<|end|>\n", "{}<|end|>\n" + _END, None),
    "deepseekv3": ("{}" + _DEEPSEEK, None, _DEEPSEEK_CALL + _DEEPSEEK),
    "deepseek_r1_distill": ("{}" + _DEEPSEEK, None, None),
    "nemotron_3_nano": ("{}" + _CHATML, None, "\n" + _XML_CALL + "\n" + _CHATML),
    "nemotron_3_ultra": ("{}" + _CHATML, None, "\n" + _XML_CALL + "\n" + _CHATML),
    "gemma3": ("{}<end_of_turn>\n", None, ""),
    "gemma4": ("{}<turn|>\n", None, "<|tool_call>call:add{a:1,b:2}<tool_call|><|tool_response>"),
    "cohere2": ("{}<|END_RESPONSE|><|END_OF_TURN_TOKEN|>", None, ""),
    "lfm2_2_5": ("{}" + _CHATML, None, "<|tool_call_start|>[add(a=1, b=2)]<|tool_call_end|>" + _CHATML),
    "glm4moe": ("\n{}<|user|>", None, "\n" + _GLM_CALL + "<|observation|>"),
}


def template_of(family: str) -> str:
    path = importlib.resources.files("trl").joinpath("chat_templates", f"{family}.jinja")
    if not path.is_file():
        pytest.skip(f"this TRL has no template of {family}")
    return path.read_text(encoding="utf-8")


@pytest.fixture
def of_family(tokenizer):
    def set_template(family: str):
        tokenizer.chat_template = template_of(family)
        tokenizer.add_special_tokens({"eos_token": _END})
        return tokenizer

    return set_template


def runs(tokenizer, messages, **settings) -> list[str]:
    """Text of each run of tokens that count as the assistant's."""
    ids, mask = response_mask(tokenizer, messages, **settings)
    assert len(ids) == len(mask)
    found, previous = [], False
    for token, keep in zip(ids, mask, strict=True):
        if keep:
            found = [*found[:-1], [*found[-1], token]] if previous else [*found, [token]]
        previous = keep
    return [tokenizer.decode(run) for run in found]


@pytest.mark.parametrize("family", FAMILIES)
def test_exactly_the_assistants(of_family, family):
    tokenizer, (reply, last, call) = of_family(family), FAMILIES[family]
    last = last or reply
    assert runs(tokenizer, ONE) == [last.format("A1.")]
    assert runs(tokenizer, TWO) == [reply.format("A1."), last.format("A2.")]
    system = {"role": "system", "content": "Be kind."}
    assert runs(tokenizer, [system, *TWO]) == [reply.format("A1."), last.format("A2.")]
    beginning = [*TWO[:-1], {"role": "assistant", "content": "A2.", "prefix": True}]
    assert runs(tokenizer, beginning)[-1] == last.partition("{}")[0] + "A2."
    if call:
        assert runs(tokenizer, WITH_TOOLS, tools=TOOLS) == [call, last.format("It is 3.")]
    else:
        with pytest.raises(
            ProConError, match="rejects a conversation" if call == "" else "leaves out what the assistant says or calls"
        ):
            runs(tokenizer, WITH_TOOLS, tools=TOOLS)


@pytest.mark.parametrize("family", ["llama3", "qwen2_5", "qwen3_instruct_2507", "gemma3", "cohere2"])
def test_trls_marks_and_prefixes_agree_if_both_are_there(of_family, family, monkeypatch):
    tokenizer = of_family(family)
    marked = response_mask(tokenizer, TWO)
    monkeypatch.setattr(masks, "marked_template", lambda _: None)
    assert response_mask(tokenizer, TWO) == marked


def test_without_trl_it_is_said_what_to_install(of_family, monkeypatch):
    monkeypatch.setitem(sys.modules, "trl.chat_template_utils", None)
    monkeypatch.setattr(masks, "_TRAINING_TEMPLATES", {})
    tokenizer = of_family("qwen3")
    assert runs(tokenizer, ONE) == ["A1.<|im_end|>\n"]
    with pytest.raises(ProConError, match=r"rewrites earlier turns.*install TRL"):
        runs(tokenizer, TWO)


@pytest.mark.parametrize("thinking", [{}, {"enable_thinking": True}])
def test_a_real_thought_is_the_assistants(of_family, thinking):
    thoughtful = [ONE[0], {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nA1."}]
    chat = ChatSettings(chat_template_kwargs=thinking)
    assert runs(of_family("qwen3"), thoughtful, chat=chat) == ["<think>\nHm.\n</think>\n\nA1.<|im_end|>\n"]
    # Qwen3.5's prompt opens the thought if thinking is on, and has an empty one if it is off.
    opening = "" if thinking else "<think>\n"
    assert runs(of_family("qwen3_5_think"), thoughtful, chat=chat) == [opening + "Hm.\n</think>\n\nA1.<|im_end|>\n"]


def test_marks_of_the_tokenizers_own_template(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}{% generation %}{{ m.content }}!"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    assert runs(tokenizer, TWO) == ["A1.!", "A2.!"]


def test_a_template_for_images_gets_texts_in_parts(of_family):
    """As a plain text it would say nothing, and not that it does."""
    (reply,) = runs(of_family("smolvlm"), ONE)
    assert ONE[-1]["content"] in reply
