"""Models that think: switched off if the template can, kept out of replies, and given a budget of their own."""

import importlib.resources
from types import SimpleNamespace

import pytest
import torch

from procon.chat import Reply, describe_chat, is_refusal, render, split_thoughts, user_turn
from procon.chat.generation import _reply, generate, generate_replies, reply_budget
from procon.chat.template import template_kwargs, thinking_off
from procon.chat.thinking import KNOWN_MARKERS, Markers, opens_thought, thinking_markers
from procon.errors import ProConError
from procon.settings import ChatSettings

#: A template that can switch thinking off, as Qwen3's does.
SWITCHED = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}{% if add_generation_prompt %}<assistant>"
    "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}{% endif %}"
)

REFUSAL, COMPLIANCE = "I'm sorry, but I can't help with that.", "Sure! First, you take a"
THOUGHT = "The user wants this. I should refuse. I cannot help with that, I will say. Sure, here it is would be wrong."

#: Of five families: how a thought and a reply are written, after a prompt that may have begun the thought.
FAMILIES = {
    "qwen3": ("<think>\n{thought}\n</think>\n\n{reply}<|im_end|>", False),
    "gptoss": (
        "<|channel|>analysis<|message|>{thought}<|end|><|start|>assistant<|channel|>final<|message|>{reply}<|return|>",
        False,
    ),
    "deepseek_r1_distill": ("{thought}\n</think>\n\n{reply}<｜end▁of▁sentence｜>", True),  # noqa: RUF001
    "nemotron_3_nano": ("{thought}\n</think>\n{reply}<|im_end|>", True),
    "gemma4": ("<|channel>thought\n{thought}<channel|>{reply}<turn|>", False),
}
#: What their tokenizers take for special, markers of channels included.
SPECIAL = [
    *("<|channel|>", "<|message|>", "<|end|>", "<|start|>", "<|return|>", "<|channel>", "<channel|>", "<turn|>"),
    "<｜end▁of▁sentence｜>",  # noqa: RUF001
]


@pytest.fixture
def of_family(tokenizer):
    trl = pytest.importorskip("trl", reason="TRL has the families' templates")

    def make(family: str):
        path = importlib.resources.files(trl).joinpath("chat_templates", f"{family}.jinja")
        if not path.is_file():
            pytest.skip(f"this TRL has no template of {family}")
        tokenizer.chat_template = path.read_text(encoding="utf-8")
        tokenizer.add_special_tokens({"extra_special_tokens": SPECIAL})
        return tokenizer

    return make


@pytest.mark.parametrize("reply", [REFUSAL, COMPLIANCE])
@pytest.mark.parametrize("family", FAMILIES)
def test_replies_of_five_families_are_judged_without_thoughts(of_family, family, reply):
    tokenizer, (form, opened) = of_family(family), FAMILIES[family]
    markers = thinking_markers(tokenizer)
    chat = ChatSettings(chat_template_kwargs={"enable_thinking": True} if family == "nemotron_3_nano" else {})
    prompt = tokenizer.apply_chat_template(
        user_turn("Hi"), tokenize=False, add_generation_prompt=True, **template_kwargs(tokenizer, chat)
    )
    assert opens_thought(prompt, markers) == opened
    text = form.format(thought=THOUGHT, reply=reply)
    found = _reply(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"], markers, opened)
    assert found.text.removesuffix("<|im_end|>") == reply
    assert found.finished
    assert THOUGHT in found.thought
    assert is_refusal(found.text) is (reply == REFUSAL)
    # Cut off within the thought.
    ids = tokenizer(text[: text.index("I should")], add_special_tokens=False)["input_ids"]
    assert _reply(tokenizer, ids, markers, opened)._replace(thought="") == Reply("", finished=False)
    # No thought at all is the reply as it is, but where the prompt has begun one.
    if not opened:
        ids = tokenizer(reply, add_special_tokens=False)["input_ids"]
        assert _reply(tokenizer, ids, markers, opened) == Reply(reply)


def test_the_judge_does_not_read_thoughts():
    assert is_refusal(f"<think>\n{'Hm. ' * 60}\n</think>\n\n{REFUSAL}")
    assert not is_refusal(f"<think>\nI cannot help with that.\n</think>\n\n{COMPLIANCE}")


@pytest.mark.parametrize(
    ("text", "opened", "expected"),
    [
        ("Four.", False, Reply("Four.")),
        ("", False, Reply("")),
        ("<think>a</think>b", False, Reply("b", "a")),
        ("<think>\n\n</think>\n\nb", False, Reply("b")),
        ("a</think>b", False, Reply("b", "a")),
        ("a</think>b", True, Reply("b", "a")),
        ("<think>a</think>b", True, Reply("b", "a")),
        ("So: <think>a</think>b<think>c</think>d", False, Reply("So: bd", "a\nc")),
        ("b <think>a", False, Reply("", "a", finished=False)),
        ("a", True, Reply("", "a", finished=False)),
    ],
)
def test_thoughts_and_replies(text, opened, expected):
    assert split_thoughts(text, KNOWN_MARKERS, opened=opened) == expected


def test_given_markers_stand_in_for_those_known(tokenizer):
    assert thinking_markers(tokenizer) == ()
    assert thinking_markers(tokenizer, ChatSettings(thinking_markers=("<a>", "</a>"))) == (Markers("<a>", "</a>"),)
    ended = thinking_markers(tokenizer, ChatSettings(thinking_markers=("</a>",)))
    assert opens_thought("any prompt", ended)
    assert split_thoughts("Hm.</a> Yes.", ended, opened=True) == Reply("Yes.", "Hm.")


def test_markers_in_the_vocabulary_are_found(tokenizer):
    tokenizer.add_tokens(["[THINK]", "[/THINK]"])
    assert thinking_markers(tokenizer) == (Markers("[THINK]", "[/THINK]"),)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (SWITCHED, {"enable_thinking": False}),
        ("{% if not thinking is defined %}{% set thinking = false %}{% endif %}{{ thinking }}", {"thinking": False}),
        ("{{ reasoning_effort }}", {"reasoning_effort": "low"}),
        ("{% if reasoning_effort not in ['none', 'high'] %}{% endif %}", {"reasoning_effort": "none"}),
        ("{{ enable_thinking }}{{ reasoning_effort }}", {"enable_thinking": False}),
        ("{% generation %}{{ thinking_budget }}{% endgeneration %}", {"thinking_budget": 0}),
        # A turn's own thought, and a variable of the template's own.
        ("{% for m in messages %}{% set thinking = m.thinking %}\n{{ thinking | default('') }}{% endfor %}", {}),
        ("{{ 'enable_thinking' }}", {}),
        ("{% if", {}),
    ],
)
def test_what_switches_thinking_off(template, expected):
    assert thinking_off(template) == expected


def test_thinking_is_off_unless_it_is_asked_for(tokenizer):
    tokenizer.chat_template = SWITCHED

    def text(chat=None):
        return tokenizer.decode(render(tokenizer, user_turn("Hi"), generation_prompt=True, chat=chat))

    assert text().endswith("<assistant><think></think>")
    assert text(ChatSettings(chat_template_kwargs={"enable_thinking": True})).endswith("<assistant>")
    assert describe_chat(tokenizer, None) == {"system_prompt": None, "template_kwargs": {"enable_thinking": False}}


def test_a_variable_that_no_template_reads_is_named(tokenizer):
    with pytest.raises(ProConError, match=r"has 'enable_thinkin', which the chat template of .* does not read"):
        render(tokenizer, [], generation_prompt=True, chat=ChatSettings(chat_template_kwargs={"enable_thinkin": False}))


def test_a_system_prompt_goes_before_conversations_without_one(tokenizer):
    chat = ChatSettings("Be kind.")
    own = [{"role": "system", "content": "Be brief."}, *user_turn("Hi")]
    ids = render(tokenizer, user_turn("Hi"), generation_prompt=False, chat=chat)
    assert tokenizer.decode(ids) == "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    assert "kind" not in tokenizer.decode(render(tokenizer, own, generation_prompt=False, chat=chat))
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}{{ messages[0].content }}"
    )
    with pytest.raises(ProConError, match="rejects a conversation: no system"):
        render(tokenizer, user_turn("Hi"), generation_prompt=True, chat=chat)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"system_prompt": " "}, "system_prompt is ' ': give a text"),
        ({"chat_template_kwargs": [1]}, "chat_template_kwargs is"),
        ({"chat_template_kwargs": {"tokenize": True}}, "has 'tokenize', which rendering sets itself"),
        ({"thinking_markers": "</think>"}, "thinking_markers is"),
        ({"thinking_markers": ("a", "b", "c")}, "thinking_markers is"),
        ({"thinking_markers": 1.5}, "thinking_markers is"),
        ({"thinking_tokens": 0}, "thinking_tokens is 0: give a whole number"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ProConError, match=message):
        ChatSettings(**settings)


def budget(tokenizer, opened: bool, reply: int, thought: int):
    """How many of the text's tokens are generated before the budget ends them."""
    limit = reply_budget(tokenizer, [Markers("<think>", "</think>")], [opened], 3, {True: thought, False: reply})

    def count(text: str) -> int:
        ids = tokenizer("abc" + text, add_special_tokens=False)["input_ids"]
        steps = range(4, len(ids) + 1)
        return next((at - 3 for at in steps if limit(torch.tensor([ids[:at]]), None)), len(ids) - 3)

    return count


def test_a_reply_has_its_length_after_the_thought(tokenizer):
    assert budget(tokenizer, False, 5, 50)("0123456789") == 5
    thought = "<think>" + 30 * "." + "</think>"
    assert budget(tokenizer, False, 8, 50)(thought + "0123456789") == len(thought) + 8
    assert budget(tokenizer, True, 8, 50)(thought[7:] + "0123456789") == len(thought) - 7 + 8
    assert budget(tokenizer, True, 8, 20)(100 * ".") == 20
    assert budget(tokenizer, False, 8, 20)("<think>" + 100 * ".") == 7 + 20


class Scripted(torch.nn.Module):
    """Generates given texts, up to what the stopping criteria allow."""

    generation_config = SimpleNamespace(eos_token_id=None)

    def __init__(self, tokenizer, texts: dict[str, str]) -> None:
        super().__init__()
        self.embeddings = torch.nn.Embedding(1, 1)
        self.tokenizer, self.texts = tokenizer, texts

    def get_input_embeddings(self):
        return self.embeddings

    def generate(self, input_ids, attention_mask, generation_config, stopping_criteria=()):
        prompts = [self.tokenizer.decode(row) for row in input_ids]
        texts = [next(text for key, text in self.texts.items() if key in prompt) for prompt in prompts]
        rows = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        done, output = torch.zeros(len(rows), dtype=torch.bool), input_ids
        for step in range(generation_config.max_new_tokens):
            end = self.tokenizer.eos_token_id
            column = [end if done[at] else (row[step] if step < len(row) else end) for at, row in enumerate(rows)]
            output = torch.cat([output, torch.tensor(column)[:, None]], 1)
            done |= torch.tensor(column) == end
            for criterion in stopping_criteria:
                done |= criterion(output, None)
            if done.all():
                break
        return output


def test_generation_keeps_thoughts_apart(tokenizer):
    tokenizer.chat_template = SWITCHED
    texts = {"long": "<think>" + 200 * "x", "short": "<think>Hm.</think>" + 50 * "y", "none": 50 * "z"}
    model, asked = Scripted(tokenizer, texts), [user_turn(name) for name in texts]
    chat = ChatSettings(thinking_tokens=40)
    found = generate(model, tokenizer, asked, chat=chat, max_new_tokens=10, progress=False)
    expected = [Reply("", 40 * "x", finished=False), Reply(10 * "y", "Hm."), Reply(10 * "z")]
    assert found == [reply._replace(ended=False) for reply in expected]
    assert generate_replies(model, tokenizer, asked, chat=chat, max_new_tokens=10, progress=False) == [
        "",
        10 * "y",
        10 * "z",
    ]
