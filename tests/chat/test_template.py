"""Conversations as token ids: the assistant's tokens and no others, whatever the template looks like."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from procon.chat import pad_token_id, render, response_mask, template_hash, user_turn
from procon.errors import ProConError

CONVERSATION = [
    {"role": "user", "content": "Two and two?"},
    {"role": "assistant", "content": "Four."},
    {"role": "user", "content": "Really?"},
    {"role": "assistant", "content": "  Yes,\n\nreally. "},
]

LLAMA_2 = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content.strip() }} [/INST]"
    "{% else %} {{ m.content.strip() }} </s>{% endif %}{% endfor %}"
)
LLAMA_3 = (
    "{% for m in messages %}<h>{{ m.role }}</h>\n\n{{ m.content | trim }}<eot>{% endfor %}"
    "{% if add_generation_prompt %}<h>assistant</h>\n\n{% endif %}"
)
GEMMA = (
    "{% for m in messages %}<turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end>\n"
    "{% endfor %}{% if add_generation_prompt %}<turn>model\n{% endif %}"
)
DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}<s>Be good.</s>{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# Qwen3's: what was thought is kept in the last turn only.
FORGETS_THOUGHTS = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content if loop.last else m.content.split('</think>')[-1] }}</>"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
OPENS_WITH_THOUGHTS = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant><think>{% endif %}"
)


# In the manner of SmolVLM's, and of LLaVA's.
PARTS_ONE_BY_ONE = (
    "{{ bos_token + '' }}{% for m in messages %}<{{ m.role }}>{% for part in m.content %}{% if part.type == 'text' %}"
    "{{ part.text }}{% endif %}{% endfor %}</>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
PARTS_BY_TYPE = (
    "{% for m in messages %}<{{ m.role }}>{% for part in m.content | selectattr('type', 'equalto', 'text') %}"
    "{{ part['text'] }}{% endfor %}</>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def runs(tokenizer, messages) -> list[str]:
    """Text of each run of tokens that count as the assistant's."""
    ids, mask = response_mask(tokenizer, messages)
    assert len(ids) == len(mask)
    found, previous = [], False
    for token, keep in zip(ids, mask, strict=True):
        if keep:
            found = [*found[:-1], [*found[-1], token]] if previous else [*found, [token]]
        previous = keep
    return [tokenizer.decode(run) for run in found]


@pytest.mark.parametrize(
    ("template", "replies"),
    [
        (None, ["Four.<|im_end|>\n", "  Yes,\n\nreally. <|im_end|>\n"]),
        (LLAMA_2, [" Four. </s>", " Yes,\n\nreally. </s>"]),
        (LLAMA_3, ["Four.<eot>", "Yes,\n\nreally.<eot>"]),
        (GEMMA, ["Four.<end>\n", "Yes,\n\nreally.<end>\n"]),
        (DEFAULT_SYSTEM, ["Four.</>", "  Yes,\n\nreally. </>"]),
        (PARTS_ONE_BY_ONE, ["Four.</>", "  Yes,\n\nreally. </>"]),
        (PARTS_BY_TYPE, ["Four.</>", "  Yes,\n\nreally. </>"]),
    ],
    ids=["chatml", "llama-2", "llama-3", "gemma", "default system", "parts", "parts by type"],
)
def test_the_assistants_tokens_and_no_others(tokenizer, template, replies):
    tokenizer.chat_template = template or tokenizer.chat_template
    assert runs(tokenizer, CONVERSATION) == replies
    assert runs(tokenizer, CONVERSATION[:2]) == replies[:1]
    assert runs(tokenizer, CONVERSATION[:3]) == replies[:1]
    assert runs(tokenizer, CONVERSATION[:1]) == []


def test_system_turns_are_not_the_assistants(tokenizer):
    system = {"role": "system", "content": "You are the assistant."}
    assert runs(tokenizer, [system, *CONVERSATION[:2]]) == ["Four.<|im_end|>\n"]


def test_the_mask_starts_where_generation_does(tokenizer):
    ids, mask = response_mask(tokenizer, CONVERSATION[:2])
    prompt = render(tokenizer, user_turn("Two and two?"), generation_prompt=True)
    assert ids[: mask.index(True)] == prompt


def test_render_is_the_template_and_nothing_more(tokenizer):
    turn = "<|im_start|>user\nHi<|im_end|>\n"
    ids = render(tokenizer, user_turn("Hi"), generation_prompt=True)
    assert tokenizer.decode(ids) == turn + "<|im_start|>assistant\n"
    assert ids[0] == tokenizer.bos_token_id != ids[1]
    assert tokenizer.decode(render(tokenizer, user_turn("Hi"), generation_prompt=False)) == turn


@pytest.mark.parametrize("content", ["\nFour.", "\n\n\nFour.", "Four.\n", "\n"])
def test_a_token_across_the_boundary_is_the_replys(content):
    vocabulary = ["<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ĊĊ"]
    model = Tokenizer(models.BPE({word: number for number, word in enumerate(vocabulary)}, merges=[("Ċ", "Ċ")]))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>")
    tokenizer.chat_template = GEMMA.replace(" | trim", "")
    messages = [*user_turn("Two and two?"), {"role": "assistant", "content": content}, *user_turn("Good")]

    ids, mask = response_mask(tokenizer, messages)
    offsets = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False), return_offsets_mapping=True)
    start = len(tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True))
    end = len(tokenizer.apply_chat_template(messages[:2], tokenize=False))
    assert ids == offsets["input_ids"]
    assert mask == [start < token_end <= end for _, token_end in offsets["offset_mapping"]]
    assert (ids[mask.index(True)] == len(vocabulary) - 1) == content.startswith("\n")


@pytest.mark.parametrize("template", [FORGETS_THOUGHTS, OPENS_WITH_THOUGHTS])
def test_a_template_whose_turns_cannot_be_told_apart(tokenizer, template):
    tokenizer.chat_template = template
    thinking = [CONVERSATION[0], {"role": "assistant", "content": "<think>2+2</think>4"}, *CONVERSATION[2:]]
    with pytest.raises(ProConError, match="keep one assistant turn a sample, or set"):
        response_mask(tokenizer, thinking)
    if template == FORGETS_THOUGHTS:
        assert runs(tokenizer, thinking[:2]) == ["<think>2+2</think>4</>"]


def test_no_chat_template(tokenizer):
    tokenizer.chat_template = None
    tokenizer.name_or_path = "some/model"
    with pytest.raises(ProConError, match="'some/model' has no chat template: set "):
        render(tokenizer, user_turn("Hi"), generation_prompt=True)


@pytest.mark.parametrize("template", [DEFAULT_SYSTEM, PARTS_ONE_BY_ONE, PARTS_BY_TYPE])
def test_what_the_user_says_is_in_the_prompt(tokenizer, template):
    tokenizer.chat_template = template
    asked = tokenizer.decode(render(tokenizer, user_turn("Hi"), generation_prompt=True))
    assert asked.endswith("<user>Hi</><assistant>")


def test_a_template_that_leaves_out_what_the_user_says(tokenizer):
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{% endfor %}"
    with pytest.raises(ProConError, match="leaves out what a user says: set tokenizer"):
        render(tokenizer, user_turn("Hi"), generation_prompt=True)


def test_a_template_that_objects(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(ProConError, match="rejects a conversation: System role not supported"):
        render(tokenizer, user_turn("Hi"), generation_prompt=True)


def test_template_hash_tells_templates_apart(tokenizer):
    first = template_hash(tokenizer)
    assert template_hash(tokenizer) == first
    tokenizer.chat_template += " "
    assert template_hash(tokenizer) != first


def test_padding_falls_back_to_the_end_of_text(tokenizer):
    assert pad_token_id(tokenizer) == tokenizer.pad_token_id != tokenizer.eos_token_id
    tokenizer.pad_token = None
    assert pad_token_id(tokenizer) == tokenizer.eos_token_id
    tokenizer.eos_token = None
    assert pad_token_id(tokenizer) == 0


def test_a_templates_own_error_moves_no_cursor(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('\x1b[2J' + messages[0]['content']) }}"
    with pytest.raises(ProConError, match="rejects a conversation") as caught:
        render(tokenizer, user_turn("\x1b]0;title\x07"), generation_prompt=True)
    assert str(caught.value).isprintable()
