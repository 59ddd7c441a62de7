"""Data files: the one that is named, as it is now; and files that are broken, or meant to break what reads them."""

import json
import os
from pathlib import Path

import datasets
import pytest
from datasets import Dataset

from procon.chat import load_instructions
from procon.data import load_conversations
from procon.directions import Directions, load_vectors
from procon.errors import ProConError
from procon.evaluation import Evaluation
from procon.method import Probes
from procon.report import read_runs


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


def line(prompt: str = "a", completion: str = "b") -> str:
    return json.dumps({"prompt": prompt, "completion": completion}) + "\n"


def prompts(path: Path) -> list[str]:
    return [turns[0]["content"] for turns in load_conversations(path)["messages"]]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
@pytest.mark.parametrize("name", ["train[1]", "a*", "a?", "{a,b}", "[!a]", "**"])
def test_a_name_is_no_pattern(tmp_path, name, suffix):
    """Nor is it a list of further files."""

    def write(stem: str, prompt: str) -> Path:
        path = tmp_path / f"{stem}{suffix}"
        if suffix == ".parquet":
            Dataset.from_dict({"prompt": [prompt], "completion": ["b"]}).to_parquet(path)
        else:
            path.write_text(line(prompt) if suffix != ".csv" else f"prompt,completion\n{prompt},b\n")
        return path

    for other in ("train1", "a1", "ab", "a", "b"):
        write(other, "other")
    assert prompts(write(name, "named")) == ["named"]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_a_file_is_read_as_it_is_now(tmp_path, suffix):
    """Though its name, size and time are those of another content that was read before."""
    path = tmp_path / f"d{suffix}"
    text = {".jsonl": line("first"), ".csv": "prompt,completion\nfirst,b\n"}[suffix]
    path.write_text(text)
    before = path.stat()
    assert prompts(path) == ["first"]
    path.write_text(text.replace("first", "other"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_mtime_ns, path.stat().st_size) == (before.st_mtime_ns, before.st_size)
    assert prompts(path) == ["other"]


def test_a_file_is_parsed_once(tmp_path, monkeypatch):
    path = tmp_path / "d.jsonl"
    path.write_text(line("first"))
    assert prompts(path) == ["first"]
    monkeypatch.setattr("procon.data.files.parse_json", lambda text: pytest.fail("read again"))
    assert prompts(path) == ["first"]


DEEP = "[" * 20_000 + "]" * 20_000
SURROGATE = '{"prompt": "\\ud800", "completion": "b"}'


def parquet(path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = pa.Array.from_buffers(pa.string(), 1, pa.array([b"caf\xe9"]).buffers())
    pq.write_table(pa.table({"prompt": texts, "completion": ["b"]}), path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.jsonl", DEEP, "nested more than 64 levels deep"),
        ("d.jsonl", line() + '{"prompt": ' + DEEP + ', "completion": "b"}', "row 2.* nested more than 64 levels deep"),
        ("d.json", '[{"prompt": "a", "completion": "b", "x": ' + DEEP + "}]", "nested more than 64 levels deep"),
        ("d.json", '{"a":' * 20_000 + "1" + "}" * 20_000, "nested more than 64 levels deep"),
        ("d.jsonl", '"\n' + DEEP, "row 1"),
        ("d.jsonl", '{"prompt": ' + "9" * 5000 + ', "completion": "b"}', "row 1.* a number of 5000 digits"),
        ("d.jsonl", '{"prompt": "caf\xe9", "completion": "b"}'.encode("latin-1"), "row 1.* not UTF-8"),
        ("d.json", '[{"prompt": "caf\xe9", "completion": "b"}]'.encode("latin-1"), "not UTF-8"),
        ("d.csv", "prompt,completion\ncaf\xe9,b\n".encode("latin-1"), "not UTF-8"),
        ("d.jsonl", SURROGATE, "row 1.* half of a surrogate pair"),
        ("d.json", f"[{SURROGATE}]", "half of a surrogate pair"),
        ("d.jsonl", line("a" * 1_000_001), "row 1: prompt has 1000001 characters: give at most 1000000"),
        ("d.csv", "prompt,completion\n" + "a" * 1_000_001 + ",b\n", "field limit .1000000"),
        ("d.csv", "prompt,prompt,completion\na,b,c\n", "has the column 'prompt' twice"),
        ("d.csv", b"prompt,completion\na\0,b\n\0", "row 2: not as many cells|line contains NUL"),
        ("d.jsonl", "7\n", "row 1 is 7: give an object"),
        ("d.json", "[7]", "row 1 is 7: give an object"),
        ("d.json", '["a"]', "row 1 is 'a': give an object"),
        ("d.jsonl", "\n \n", "holds no rows"),
        ("d.json", "\ufeff", "holds no rows"),
        ("d.parquet", parquet, "cannot be read as parquet"),
        ("d.parquet", b"PAR1" * 10, "cannot be read as parquet"),
    ],
)
def test_a_broken_file_is_told_in_one_line(tmp_path, name, content, message):
    path = tmp_path / name
    if callable(content):
        content(path)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ProConError, match=message) as caught:
        load_conversations(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400 + len(str(path))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("d.jsonl", '\ufeff{"prompt": "a\u2028b", "completion": "\x85."}\r\n\r\n{"prompt": "c", "completion": "d"}'),
        ("d.json", '{"prompt": "a\u2028b", "completion": "\x85."}\n{"prompt": "c", "completion": "d"}\n'),
        ("d.jsonl", ' [{"prompt": "a\u2028b", "completion": "\x85."}, {"prompt": "c", "completion": "d", "n": [[]]}]'),
        ("d.csv", "\ufeffprompt,completion\r\na\u2028b,\x85.\r\nc,d\r\n"),
    ],
)
def test_unusual_files_that_are_in_order(tmp_path, name, text):
    path = tmp_path / name
    path.write_bytes(text.encode())
    assert prompts(path) == ["a\u2028b", "c"]


def test_a_long_text_that_is_in_order(tmp_path):
    (tmp_path / "d.jsonl").write_text(line("a" * 1_000_000))
    (tmp_path / "d.csv").write_text("prompt,completion\n" + "a" * 1_000_000 + ",b\n")
    for name in ("d.jsonl", "d.csv"):
        assert len(prompts(tmp_path / name)[0]) == 1_000_000


def test_a_folder_is_no_data_file(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "train.jsonl").write_text(line())
    with pytest.raises(ProConError, match="is a folder: give a file in it"):
        load_conversations(tmp_path / "d")


@pytest.mark.parametrize(
    "read",
    [
        load_conversations,
        load_instructions,
        Directions.load,
        load_vectors,
        lambda name: read_runs([name]),
        Evaluation.load,
        Probes.load,
    ],
)
@pytest.mark.parametrize("name", ["a" * 5000, "a/" * 3000, "\0"])
def test_a_name_that_no_file_can_have(read, name):
    with pytest.raises(ProConError):
        read(name)


def test_rows_with_other_further_columns(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text('{"prompt": "a", "completion": "b", "x": 1}\n{"prompt": "c", "completion": "d", "x": "y", "z": {}}')
    assert prompts(path) == ["a", "c"]


def test_doubtful_conversations_are_counted(tmp_path):
    """And said again when the file is not parsed again."""
    path = tmp_path / "d.jsonl"
    two = [{"role": "assistant", "content": text} for text in "ab"]
    rows = [
        line(),
        line("c", " \n"),
        line("", "d"),
        line("e", ""),
        json.dumps({"prompt": "f", "completion": two}) + "\n",
    ]
    path.write_text("".join(rows))
    for _ in range(2):
        with pytest.warns(UserWarning, match="conversations of") as caught:
            assert prompts(path) == ["a", "", "f"]
        assert [str(warning.message).partition("' have ")[2] for warning in caught] == [
            "a blank reply, first row 2, and are left out",
            "a blank user turn, first row 3, and are trained on as they are",
            "two assistant turns in a row, first row 5, and are trained on as they are",
        ]
        assert str(caught[0].message).startswith(f"2 of 5 conversations of '{path}'")
    path.write_text(rows[1])
    with (
        pytest.warns(UserWarning, match="1 of 1 conversations"),
        pytest.raises(ProConError, match="has no conversation without a blank reply"),
    ):
        load_conversations(path)
