"""Training data: every file type, the file that is named, labels on the reply alone, and the safety mix."""

import csv
import json
from collections import Counter
from pathlib import Path

import datasets
import pytest
from datasets import Dataset, IterableDataset

from procon.chat import (
    builtin_drift_pairs,
    builtin_probe_pairs,
    builtin_prompts,
    builtin_refusals,
    continue_tokens,
    generate_replies,
    render,
)
from procon.data import (
    load_conversations,
    mix_in,
    own_replies,
    safety_conversations,
    to_conversations,
    tokenize_conversations,
)
from procon.errors import ProConError
from procon.sequences import IGNORE_INDEX
from procon.settings import ChatSettings


def user(content: str) -> dict:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict:
    return {"role": "assistant", "content": content}


QUESTION, ANSWER = "Which way,\nleft or \u201cright\u201d?", "12"
CONVERSATION = [user(QUESTION), assistant(ANSWER)]
LONG = [{"role": "system", "content": "Be kind."}, *CONVERSATION, user("Sure?"), assistant("Yes.")]
ASKED = [user("Q?"), assistant("A.")]

#: As values of a text that a table would read as a number, a date, or as nothing.
ROWS = [{"prompt": QUESTION, "completion": answer} for answer in (ANSWER, "None", "2026-01-01", "007", "\x85.")]


def write(path: Path, rows: list[dict]) -> Path:
    if path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        Dataset.from_list(rows).to_parquet(path)
    return path


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet"])
def test_every_file_as_it_is_written_and_named(tmp_path, suffix):
    """A name is no pattern, and no list of further files."""
    for other in ("train1", "a1", "ab", "a", "b"):
        write(tmp_path / f"{other}{suffix}", ROWS[:1])
    for name in ("train[1]", "a*", "{a,b}"):
        loaded = load_conversations(write(tmp_path / f"{name}{suffix}", ROWS))
        assert loaded.column_names == ["messages"]
        assert loaded["messages"][:] == [[user(row["prompt"]), assistant(row["completion"])] for row in ROWS]
    capitals = (tmp_path / f"a*{suffix}").rename(tmp_path / f"A{suffix.upper()}")
    assert len(load_conversations(str(capitals))) == len(ROWS)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("d.jsonl", '\ufeff{"prompt": "a\u2028b", "completion": "."}\r\n\r\n{"prompt": "c", "completion": "d"}'),
        ("d.json", '{"prompt": "a\u2028b", "completion": "."}\n{"prompt": "c", "completion": "d", "x": {}}\n'),
        ("d.jsonl", ' [{"prompt": "a\u2028b", "completion": "."}, {"prompt": "c", "completion": "d", "n": [[]]}]'),
        ("d.csv", "\ufeffprompt,completion\r\na\u2028b,.\r\nc,d\r\n"),
    ],
)
def test_unusual_files_that_are_in_order(tmp_path, name, text):
    (tmp_path / name).write_bytes(text.encode())
    loaded = load_conversations(tmp_path / name)
    assert [turns[0]["content"] for turns in loaded["messages"]] == ["a\u2028b", "c"]


def parquet(path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = pa.Array.from_buffers(pa.string(), 1, pa.array([b"caf\xe9"]).buffers())
    pq.write_table(pa.table({"prompt": texts, "completion": ["b"]}), path)


LINE = '{"prompt": "a", "completion": "b"}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.json", None, "does not exist"),
        ("d", Path.mkdir, "is no file of a known type: give"),
        ("d.txt", "hello", "is no file of a known type: give"),
        ("d.jsonl", "", "no data"),
        ("d.json", "[]", "no data"),
        ("d.csv", "prompt,completion\n", "no data"),
        ("d.jsonl", "\n \n", "no data"),
        ("d.json", '[{"prompt": "a", ', "cannot be read"),
        ("d.jsonl", LINE + '{"prompt"', "cannot be read .row 2: "),
        ("d.jsonl", LINE + "7\n", "row 2 is no conversation"),
        ("d.jsonl", LINE + '{"prompt": "a"}\n', "row 2 is no conversation"),
        ("d.csv", "prompt,completion\na,b\nc,d,e\n", "row 2 is no conversation .more cells than columns."),
        ("d.csv", "prompt,completion\na\n", "row 1 is no conversation .a role or a content is no text."),
        ("d.csv", 'messages\n"[{}]"\n', "row 1 is no conversation"),
        ("d.parquet", "PAR1" * 10, "cannot be read"),
        ("d.parquet", parquet, "cannot be read"),
        ("d.jsonl", '{"prompt": "caf\xe9", "completion": "b"}'.encode("latin-1"), "cannot be read"),
        ("d.csv", "prompt,completion\ncaf\xe9,b\n".encode("latin-1"), "cannot be read"),
        ("d.jsonl", LINE + '{"prompt": "\\ud800", "completion": "b"}', "cannot be read"),
        ("d.jsonl", LINE + '{"a":' * 20_000 + "1" + "}" * 20_000, "cannot be read .row 2"),
        ("d.json", "[" * 20_000 + "]" * 20_000, "cannot be read"),
    ],
)
def test_a_bad_file_is_named_in_one_line(tmp_path, name, content, message):
    path = tmp_path / name
    if callable(content):
        content(path)
    elif content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ProConError, match=message) as caught:
        load_conversations(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600 + len(str(path))


def test_a_set_on_the_hub_by_configuration_split_and_revision(tmp_path, monkeypatch):
    asked = []

    def load(*args, **kwargs):
        asked.append((args, kwargs))
        return Dataset.from_list([{"question": "Q?", "answer": "A."}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    settings = {"config": "main", "split": "test[:9]", "revision": "abc"}
    assert load_conversations("openai/gsm8k", **settings)["messages"][:] == [ASKED]
    assert asked == [(("openai/gsm8k", "main"), {"split": "test[:9]", "revision": "abc"})]
    path = write(tmp_path / "d.jsonl", ROWS)
    for name, value in settings.items():
        with pytest.raises(ProConError, match="is a file: leave out data_config"):
            load_conversations(path, **{name: value})


def test_blank_replies_are_left_out_and_counted(tmp_path):
    """And said again when the file is not parsed again."""
    texts = ["a", " \n", "", "b"]
    path = write(tmp_path / "d.jsonl", [{"prompt": "q", "completion": text} for text in texts])
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"2 of 4 conversations of .* have a blank reply, and are left out"):
            assert [turns[1]["content"] for turns in load_conversations(path)["messages"]] == ["a", "b"]
    write(path, [{"prompt": "q", "completion": ""}])
    with pytest.raises(ProConError, match="has no rows, or none without a blank reply"):
        load_conversations(path)


def test_streams_are_taken_as_they_come(tokenizer):
    def streamed(*answers: str | None) -> IterableDataset:
        return Dataset.from_list([{"question": "Q?", "answer": text} for text in answers]).to_iterable_dataset()

    conversations = to_conversations(streamed("A.", " ", "A."))
    assert [row["messages"] for row in conversations] == [ASKED] * 2
    whole = tokenize_conversations(Dataset.from_list([{"messages": ASKED}]), tokenizer)[0]
    assert list(tokenize_conversations(conversations, tokenizer)) == [whole, whole]
    assert list(tokenize_conversations(conversations, tokenizer, max_length=3)) == []
    with pytest.raises(ProConError, match="data 'mine', row 2 is no conversation"):
        list(to_conversations(streamed("A.", None), name="mine"))


def replies(tokenizer, row: dict) -> str:
    assert len(row["input_ids"]) == len(row["labels"])
    pairs = list(zip(row["input_ids"], row["labels"], strict=True))
    assert all(label in (token, IGNORE_INDEX) for token, label in pairs)
    return tokenizer.decode([label for _, label in pairs if label != IGNORE_INDEX])


def tokenized(tokenizer, *conversations: list[dict], **settings) -> Dataset:
    dataset = Dataset.from_list([{"messages": messages} for messages in conversations])
    return tokenize_conversations(dataset, tokenizer, **settings)


def test_labels_are_the_assistants_tokens(tokenizer):
    rows = tokenized(tokenizer, CONVERSATION, LONG)
    assert sorted(rows.column_names) == ["input_ids", "labels"]
    assert [replies(tokenizer, row) for row in rows] == ["12<|im_end|>\n", "12<|im_end|>\nYes.<|im_end|>\n"]
    assert tokenizer.decode(rows[1]["input_ids"]) == tokenizer.apply_chat_template(LONG, tokenize=False)


def test_max_length_cuts_on_the_right(tokenizer):
    whole = tokenized(tokenizer, LONG)[0]
    end = len(whole["labels"])
    for length in (end, end + 1):
        row = tokenized(tokenizer, LONG, max_length=length)[0]
        assert row == whole
    for length in (end - 1, end - 4):
        with pytest.warns(UserWarning, match=f"are cut: {end - length} of {end} tokens are lost$"):
            row = tokenized(tokenizer, LONG, max_length=length)[0]
        assert row == {"input_ids": whole["input_ids"][:length], "labels": whole["labels"][:length]}


def test_a_sample_without_a_reply_left_is_dropped_with_a_warning(tokenizer):
    short = [user("a"), assistant("b")]
    prompt = len(tokenizer.apply_chat_template(short[:1], add_generation_prompt=True)["input_ids"])
    with pytest.warns(UserWarning, match="are left out") as warned:
        rows = tokenized(tokenizer, LONG, short, short[:1], max_length=prompt + 1)
    message = f"2 of 3 samples are left out, as they have no response within max_length {prompt + 1}"
    assert str(warned[1].message) == message
    assert [replies(tokenizer, row) for row in rows] == ["b"]
    with pytest.raises(ProConError, match=r"none of the 2 samples has a response token .* raise max_length"):
        tokenized(tokenizer, LONG, short, max_length=prompt)
    with pytest.raises(ProConError, match="max_length is 0"):
        tokenized(tokenizer, short, max_length=0)


def test_cut_rows_and_tokens_are_counted(tokenizer):
    conversations = [[user("Q"), assistant(size * "a")] for size in (5, 30, 12)]
    whole = [len(row["labels"]) for row in tokenized(tokenizer, *conversations)]
    most = whole[2] - 2
    these = f"2 of 3 samples are longer than max_length {most}, the longest has {whole[1]} tokens, first row 2, and are"
    with pytest.warns(UserWarning, match=f"{these} cut: {20 + 2} of {sum(whole)} tokens"):
        cut = tokenized(tokenizer, *conversations, max_length=most)
    assert [len(row["labels"]) for row in cut] == [whole[0], most, most]
    with pytest.warns(UserWarning, match=f"{these} left out|2 of 3 samples are left out"):
        dropped = tokenized(tokenizer, *conversations, max_length=most, overlong="drop")
    assert [len(row["labels"]) for row in dropped] == [whole[0]]
    with pytest.raises(ProConError, match="overlong is 'keep': choose one of cut, drop"):
        tokenized(tokenizer, *conversations, overlong="keep")


def test_safety_samples_are_malicious_prompts_refused():
    samples = safety_conversations()["messages"]
    prompts = builtin_prompts("safety")
    assert [[turn["role"] for turn in turns] for turns in samples] == [["user", "assistant"]] * 720
    assert tuple(turns[0]["content"] for turns in samples) == prompts.malicious
    assert set(Counter(turns[1]["content"] for turns in samples)) == set(builtin_refusals())


@pytest.fixture
def plain() -> Dataset:
    return to_conversations(Dataset.from_list([{"messages": [user(str(i)), assistant("-")]} for i in range(20)]))


def contents(dataset: Dataset) -> list[str]:
    return [turns[0]["content"] for turns in dataset["messages"]]


@pytest.mark.parametrize("samples", [0, 7, 720, 1000])
def test_safety_mix_counts(plain, samples):
    safety = safety_conversations()
    mixed = Counter(contents(mix_in(plain, safety, samples, seed=0)))
    assert mixed.total() == 20 + samples
    assert {text: mixed.pop(text) for text in contents(plain)} == dict.fromkeys(contents(plain), 1)
    assert set(mixed) <= set(contents(safety))
    # Each as often as the others, or once more: where they repeat, all have been used.
    assert set(mixed.values()) <= {samples // 720, samples // 720 + 1}
    assert len(mixed) == min(samples, 720)


def test_own_replies_are_what_the_model_says(tiny_model, tokenizer, few_probes):
    """To the probes and their twins, under the system prompt that it is asked with; blank replies are left out."""
    model, pairs = tiny_model(), few_probes
    assert {*pairs.malicious, *pairs.benign} <= {*builtin_probe_pairs().malicious, *builtin_probe_pairs().benign}
    found = own_replies(model, tokenizer, progress=False)["messages"]
    asked = [turns[0]["content"] for turns in found]
    assert asked == [text for text in (*pairs.malicious, *pairs.benign) if text in asked]
    assert not {*builtin_drift_pairs().malicious, *builtin_drift_pairs().benign} & set(asked)
    replies = generate_replies(model, tokenizer, [turns[:1] for turns in found], progress=False)
    assert [turns[1]["content"] for turns in found] == replies
    system = own_replies(model, tokenizer, chat=ChatSettings(system_prompt="Be brief."), progress=False)["messages"]
    assert {turns[0]["content"] for turns in system} == {"Be brief."}


def test_the_end_of_an_own_reply_is_learned_if_it_has_one(tiny_model, tokenizer, few_probes):
    """Of one that was cut, only its tokens are: a model that learned an end there would break off its replies."""
    model = tiny_model()
    prompt = render(tokenizer, [user(few_probes.benign[0])], generation_prompt=True)
    model.generation_config.eos_token_id = continue_tokens(model, tokenizer, [prompt], progress=False)[0][20]
    samples = own_replies(model, tokenizer, progress=False)
    rows = tokenize_conversations(samples, tokenizer, progress=False)
    for (question, reply), ids, labels in zip(samples["messages"], rows["input_ids"], rows["labels"], strict=True):
        said = tokenizer.decode([label for label in labels if label != IGNORE_INDEX])
        whole = tokenizer.apply_chat_template([question, assistant(reply["content"])], tokenize=False)
        if reply.get("prefix"):
            assert (said.strip(), whole.startswith(tokenizer.decode(ids))) == (reply["content"], True)
        else:
            assert said.startswith(reply["content"])
            assert (said.endswith("<|im_end|>\n"), tokenizer.decode(ids)) == (True, whole)
    assert {bool(reply.get("prefix")) for _, reply in samples["messages"]} == {True, False}


def test_safety_mix_is_shuffled_by_its_seed(plain):
    safety = safety_conversations()
    first, again, other = (contents(mix_in(plain, safety, 20, seed=seed)) for seed in (1, 1, 2))
    assert first == again
    assert set(first) != set(other)  # other samples
    kinds = [text in contents(plain) for text in first]
    assert kinds != sorted(kinds)
    assert kinds != sorted(kinds, reverse=True)
    with pytest.raises(ProConError, match="samples to mix in are -1: give 0 or more"):
        mix_in(plain, safety, -1, seed=0)
