"""Chat data as people have them: ShareGPT, pairs, parts, tool calls, other columns; and what is no conversation."""

import json
from pathlib import Path

import pytest
from datasets import Dataset

from procon.data import load_conversations, mix_in, parse_columns, safety_conversations, tokenize_conversations
from procon.data.formats import sample_of
from procon.errors import ProConError
from procon.sequences import IGNORE_INDEX


def turn(role: str, content: str, **more) -> dict:
    return {"role": role, "content": content, **more}


ASKED = [turn("user", "Q?"), turn("assistant", "A.")]
SAID = [{"from": each["role"], "value": each["content"]} for each in ASKED]
BRIEFED = [turn("system", "Be kind."), *ASKED]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
CALLED = [
    turn("user", "Q?"),
    turn("assistant", "", tool_calls=[CALL]),
    turn("tool", "3"),
    turn("assistant", "It is 3."),
]

ROWS = {
    "messages": ({"messages": ASKED}, ASKED),
    "sharegpt": ({"conversations": [{"from": "human", "value": "Q?"}, {"from": "gpt", "value": "A."}]}, ASKED),
    "sharegpt, system in a column": (
        {"conversations": [{"from": "human", "value": "Q?"}, {"from": "gpt", "value": "A."}], "system": "Be kind."},
        BRIEFED,
    ),
    "sharegpt, system turn": ({"conversations": [{"from": "system", "value": "Be kind."}, *SAID]}, BRIEFED),
    "conversations with roles": ({"conversations": ASKED}, ASKED),
    "completion": ({"prompt": "Q?", "completion": "A."}, ASKED),
    "conversational prompt": ({"prompt": BRIEFED[:-1], "completion": BRIEFED[-1:]}, BRIEFED),
    "prompt and response": ({"prompt": "Q?", "response": "A.", "system": ""}, ASKED),
    "question": ({"question": "Q?", "answer": "A."}, ASKED),
    "output": ({"instruction": "Q?", "input": "", "output": "A.", "id": 1}, ASKED),
    "input": (
        {"instruction": "Q?", "input": "I", "output": "12"},
        [turn("user", "Q?\n\nI"), turn("assistant", "12")],
    ),
    "context": (
        {"instruction": "Q?", "context": "C", "response": "A."},
        [turn("user", "Q?\n\nC"), turn("assistant", "A.")],
    ),
    "messages first": ({"prompt": "other", "messages": ASKED, "completion": "other"}, ASKED),
    "parts": (
        {"messages": [turn("user", [{"type": "text", "text": each} for each in "Q?"]), turn("assistant", ["A."])]},
        ASKED,
    ),
}


def write(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("form", ROWS)
def test_every_format(form):
    row, expected = ROWS[form]
    assert sample_of(row, "row 1") == {"messages": expected, "tools": None}


@pytest.mark.parametrize(
    "turns",
    [
        [turn("user", "Q?"), {"role": "assistant", "content": None, "tool_calls": [CALL]}, *CALLED[2:]],
        # Arguments as OpenAI's interface gives them, without a type.
        [
            turn("user", "Q?"),
            {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": '{"a": 1}'}}]},
            *CALLED[2:],
        ],
        [
            {"from": "human", "value": "Q?"},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
            {"from": "observation", "value": "3"},
            {"from": "gpt", "value": "It is 3."},
        ],
    ],
    ids=["openai", "arguments as a text", "sharegpt"],
)
def test_tool_calls_and_tools_reach_the_template(tmp_path, tokenizer, turns):
    path = write(tmp_path / "d.jsonl", {"messages": ASKED}, {"messages": turns, "tools": json.dumps(TOOLS)})
    loaded = load_conversations(path)
    plain, called = loaded
    assert (plain["messages"], plain["tools"]) == (ASKED, None)
    call = called["messages"][1]["tool_calls"][0]["function"]
    assert call == CALL["function"]
    assert [(each["role"], each["content"]) for each in called["messages"]] == [
        (each["role"], each["content"]) for each in CALLED
    ]
    assert called["tools"] == TOOLS
    tokenizer.chat_template = (
        "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}{% for m in messages %}<{{ m.role }}>"
        "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments | tojson }}"
        "{% endfor %}</>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    row = tokenize_conversations(loaded, tokenizer)[1]
    assert tokenizer.decode(row["input_ids"]).startswith(f"<tools>{json.dumps(TOOLS)}</tools><user>")
    said = tokenizer.decode([label for label in row["labels"] if label != IGNORE_INDEX])
    assert said == 'add{"a": 1}</>It is 3.</>'
    mixed = mix_in(loaded, safety_conversations(), 3, seed=0)
    assert sorted(len(turns) for turns in mixed["messages"]) == [2, 2, 2, 2, 4]
    assert len(tokenize_conversations(mixed, tokenizer)) == 5


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_columns_by_name(tmp_path, suffix):
    row = {"Q": "Q?", "A": "A.", "S": "Be kind.", "messages": [turn("user", "other"), turn("assistant", "other")]}
    path = tmp_path / f"d{suffix}"
    Dataset.from_list([row]).to_parquet(path) if suffix == ".parquet" else write(path, row)
    assert load_conversations(path, columns={"prompt": "Q", "response": "A"})["messages"][:] == [ASKED]
    columns = parse_columns("prompt=Q, response=A,system=S")
    assert load_conversations(path, columns=columns)["messages"][:] == [BRIEFED]
    with pytest.raises(ProConError, match=r"row 1 is no conversation \(no 'B'"):
        load_conversations(path, columns={"prompt": "Q", "response": "B"})


@pytest.mark.parametrize("text", ["prompt", "prompt=a,prompt=b", "question=a", "prompt=", "=a", 3])
def test_wrong_columns_are_refused(text):
    with pytest.raises(ProConError, match=r"data_columns is .*: give prompt=NAME"):
        parse_columns(text)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"query": "a", "reply": "b"}, "its columns are ['query', 'reply']"),
        ({"instruction": "a", "completion": "b"}, "its columns are ['completion', 'instruction']"),
        ({"prompt": "c"}, "its columns are ['prompt']"),
        ({"prompt": "c", "completion": None}, "a role or a content is no text"),
        ({"instruction": "a", "output": 12}, "a role or a content is no text"),
        ({"instruction": "a", "input": 1, "output": "b"}, ""),
        ({"messages": [{"role": "user", "content": None}]}, "a role or a content is no text"),
        ({"messages": [{"from": "human", "text": "a"}]}, "a role or a content is no text"),
        ({"messages": [{"content": "a"}]}, "no 'from'"),
        ({"messages": []}, ""),
        ({"messages": [], "system": "a"}, ""),
        ({"messages": "hello"}, ""),
        ({"messages": None}, ""),
        ({"messages": [turn("user", [{"type": "image", "url": "x"}])]}, "no 'text'"),
        ({"messages": [turn("assistant", "", tool_calls=["add"])]}, ""),
        ({"messages": [turn("assistant", "", tool_calls=[{"name": 3}])]}, "a tool call has no name"),
        ({"messages": ASKED, "tools": "add"}, ""),
        ({"messages": ASKED, "tools": "[1]"}, "tools are no list of objects"),
        ({"conversations": [{"from": "function_call", "value": "add("}]}, ""),
        ({"conversations": [{"from": ["gpt"], "value": "A."}]}, ""),
        (7, ""),
        ("a", ""),
        ({"messages": "x" * 10_000}, ""),
    ],
)
def test_what_is_no_conversation_is_named_in_one_line(row, reason):
    with pytest.raises(ProConError) as caught:
        sample_of(row, "data 'd.jsonl', row 2")
    assert str(caught.value).startswith(f"data 'd.jsonl', row 2 is no conversation ({reason}")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
