"""Chat data as people have them: ShareGPT, pairs, texts, parts, tool calls; columns by name; hub and streamed sets."""

import json
from pathlib import Path

import datasets
import pytest
from datasets import Dataset, IterableDataset

from procon.data import (
    load_conversations,
    mix_safety,
    parse_columns,
    safety_conversations,
    to_conversations,
    tokenize_conversations,
)
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
    "sharegpt": ({"conversations": [{"from": "human", "value": "Q?"}, {"from": "gpt", "value": "A."}]}, ASKED),
    "sharegpt, system in a column": (
        {"conversations": [{"from": "human", "value": "Q?"}, {"from": "gpt", "value": "A."}], "system": "Be kind."},
        BRIEFED,
    ),
    "sharegpt, system turn": (
        {"conversations": [{"from": "system", "value": "Be kind."}, *SAID]},
        BRIEFED,
    ),
    "conversations with roles": ({"conversations": ASKED}, ASKED),
    "question": ({"question": "Q?", "answer": "A."}, ASKED),
    "response": ({"instruction": "Q?", "response": "A."}, ASKED),
    "context": (
        {"instruction": "Q?", "context": "C", "response": "A."},
        [turn("user", "Q?\n\nC"), turn("assistant", "A.")],
    ),
    "prompt and response": ({"prompt": "Q?", "response": "A.", "system": ""}, ASKED),
    "messages first": ({"prompt": "other", "messages": ASKED, "completion": "other"}, ASKED),
    "parts": (
        {"messages": [turn("user", [{"type": "text", "text": each} for each in "Q?"]), turn("assistant", ["A."])]},
        ASKED,
    ),
}  # fmt: skip


def write(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("form", ROWS)
def test_every_format(tmp_path, form):
    row, expected = ROWS[form]
    loaded = load_conversations(write(tmp_path / "d.jsonl", row, row))
    assert loaded.column_names == ["messages"]
    assert loaded["messages"][:] == [expected, expected]
    if form != "parts":  # of one type in a table
        assert to_conversations(Dataset.from_list([row]))["messages"][:] == [expected]


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
    row = tokenize_conversations(loaded, tokenizer, progress=False)[1]
    assert tokenizer.decode(row["input_ids"]).startswith(f"<tools>{json.dumps(TOOLS)}</tools><user>")
    said = tokenizer.decode([label for label in row["labels"] if label != IGNORE_INDEX])
    assert said == 'add{"a": 1}</>It is 3.</>'
    mixed = mix_safety(loaded, safety_conversations(), 3, seed=0)
    assert sorted(len(turns) for turns in mixed["messages"]) == [2, 2, 2, 2, 4]
    assert len(tokenize_conversations(mixed, tokenizer, progress=False)) == 5


def test_texts_are_trained_on_as_a_whole_and_it_is_said(tmp_path, tokenizer):
    path = write(tmp_path / "d.jsonl", {"text": "Once upon a time."}, {"text": " "})
    with pytest.warns(UserWarning, match="has texts|a blank reply") as warned:
        loaded = load_conversations(path)
    assert "1 of 2 conversations" in str(warned[0].message)
    assert "has texts, not conversations: each is trained on as a whole, prompts included" in str(warned[1].message)
    assert loaded.to_list() == [{"text": "Once upon a time."}]
    (row,) = tokenize_conversations(loaded, tokenizer, progress=False)
    assert row["labels"] == row["input_ids"]
    assert tokenizer.decode(row["input_ids"]) == "Once upon a time.<|im_end|>"
    rows = tokenize_conversations(mix_safety(loaded, safety_conversations(), 2, seed=0), tokenizer, progress=False)
    assert sorted(label == IGNORE_INDEX for label in (row["labels"][0] for row in rows)) == [False, True, True]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_columns_by_name(tmp_path, suffix):
    row = {"Q": "Q?", "A": "A.", "S": "Be kind.", "messages": [turn("user", "other"), turn("assistant", "other")]}
    path = tmp_path / f"d{suffix}"
    Dataset.from_list([row]).to_parquet(path) if suffix == ".parquet" else write(path, row)
    assert load_conversations(path, columns={"prompt": "Q", "response": "A"})["messages"][:] == [ASKED]
    columns = parse_columns("prompt=Q, response=A,system=S")
    assert load_conversations(path, columns=columns)["messages"][:] == [BRIEFED]
    with pytest.raises(ProConError, match="has no column 'B', but"):
        load_conversations(path, columns={"prompt": "Q", "response": "B"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prompt", "data_columns has 'prompt': give each column once"),
        ("prompt=a,prompt=b", "has 'prompt=b': give each column once"),
        ("question=a", "names a column 'question': choose among messages, prompt"),
        ("prompt=a", "names prompt: give messages, or prompt and response, or text"),
        ("messages=a,text=b", "names messages, text: give messages, or"),
    ],
)
def test_wrong_columns_are_refused(text, message):
    with pytest.raises(ProConError, match=message):
        parse_columns(text)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [turn("user", [{"type": "image", "url": "x"}])]}, "has the part .*image.*: give texts alone"),
        ({"messages": [turn("assistant", "", tool_calls=["add"])]}, "tool_calls of messages has 'add': give each a"),
        ({"messages": ASKED, "tools": "add"}, "tools is 'add': give JSON"),
        ({"messages": ASKED, "tools": "[1]"}, "tools is .*: give a list of objects"),
        ({"conversations": [{"from": "function_call", "value": "add("}]}, "a function_call is 'add.': give JSON"),
        ({"conversations": [{"from": ["gpt"], "value": "A."}]}, "a turn of conversations is"),
        ({"conversations": [{"from": "gpt", "value": None}]}, "a turn of conversations is"),
    ],
)
def test_what_is_no_conversation_is_named_with_its_row(tmp_path, row, message):
    with pytest.raises(ProConError, match=f"row 2: .*{message}"):
        load_conversations(write(tmp_path / "d.jsonl", {**row, **dict.fromkeys(row, ASKED), "tools": None}, row))


def test_a_set_on_the_hub_by_configuration_split_and_revision(monkeypatch):
    asked = []

    def load(*args, **kwargs):
        asked.append((args, kwargs))
        return Dataset.from_list([{"question": "Q?", "answer": "A."}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    loaded = load_conversations("openai/gsm8k", config="main", split="test[:9]", revision="abc")
    assert loaded["messages"][:] == [ASKED]
    assert asked == [(("openai/gsm8k", "main"), {"split": "test[:9]", "revision": "abc"})]


@pytest.mark.parametrize("setting", [{"config": "main"}, {"split": "test"}, {"revision": "abc"}])
def test_a_file_has_none_of_these(tmp_path, setting):
    path = write(tmp_path / "d.jsonl", {"question": "Q?", "answer": "A."})
    with pytest.raises(ProConError, match=f"data_{next(iter(setting))} is .* is a file: leave it out"):
        load_conversations(path, **setting)


def streamed(*rows: dict) -> IterableDataset:
    return Dataset.from_list(list(rows)).to_iterable_dataset()


def test_streams_are_taken_as_they_come(tokenizer):
    rows = [{"question": "Q?", "answer": "A."}, {"question": "Q?", "answer": " "}, {"question": "Q?", "answer": "A."}]
    conversations = to_conversations(streamed(*rows), name="mine")
    with pytest.warns(UserWarning, match="'mine' has conversations with a blank reply, first row 2"):
        assert list(conversations) == [{"messages": ASKED}] * 2
    whole = tokenize_conversations(Dataset.from_list([{"messages": ASKED}]), tokenizer, progress=False)[0]
    stream = tokenize_conversations(to_conversations(streamed(rows[0], rows[2])), tokenizer)
    assert list(stream) == [whole, whole]
    with pytest.warns(UserWarning, match="row 1 of the streamed samples is longer than max_length 3"):
        assert list(tokenize_conversations(to_conversations(streamed(rows[0])), tokenizer, max_length=3)) == []
    with pytest.raises(ProConError, match="known formats are"):
        to_conversations(streamed({"query": "a"}))
    with pytest.raises(ProConError, match=r"'dataset', row 2: answer is None: give a text"):
        list(to_conversations(streamed(rows[0], {"question": "Q?", "answer": None})))


LENGTHS = (5, 30, 12)


@pytest.fixture
def rows_of_unequal_length() -> Dataset:
    return Dataset.from_list([{"messages": [turn("user", "Q"), turn("assistant", size * "a")]} for size in LENGTHS])


def test_cut_rows_and_tokens_are_counted(rows_of_unequal_length, tokenizer):
    whole = [len(row["labels"]) for row in tokenize_conversations(rows_of_unequal_length, tokenizer, progress=False)]
    settings = {"max_length": whole[2] - 2, "progress": False}
    lost, these = 20 + 2, f"2 of 3 samples are longer than max_length {whole[2] - 2}, the longest has {whole[1]} tokens"
    with pytest.warns(UserWarning, match=f"{these}, first row 2, and are cut: {lost} of {sum(whole)} tokens"):
        cut = tokenize_conversations(rows_of_unequal_length, tokenizer, **settings)
    assert [len(row["labels"]) for row in cut] == [whole[0], whole[2] - 2, whole[2] - 2]
    with pytest.warns(UserWarning, match=f"{these}, first row 2, and are left out"):
        dropped = tokenize_conversations(rows_of_unequal_length, tokenizer, overlong="drop", **settings)
    assert [len(row["labels"]) for row in dropped] == [whole[0]]
    with pytest.raises(
        ProConError, match=f"{these}, first row 2: raise max_length, or set overlong to 'cut' or 'drop'"
    ):
        tokenize_conversations(rows_of_unequal_length, tokenizer, overlong="error", **settings)
    with pytest.raises(ProConError, match="overlong is 'keep': choose one of cut, drop, error"):
        tokenize_conversations(rows_of_unequal_length, tokenizer, overlong="keep")
