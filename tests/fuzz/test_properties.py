"""Properties of what reads inputs, over examples that hypothesis makes; the same ones at every run."""

import csv
import json
from contextlib import suppress
from functools import partial
from pathlib import Path

import datasets
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from procon.chat import load_instructions
from procon.data import load_conversations
from procon.data.conversations import _file_samples
from procon.errors import ProConError, printable
from procon.files import parse_json
from procon.schedule import AlphaSchedule
from procon.settings import check_blocks, parse_blocks

#: Many where they are quick, few where files are written.
quickly = partial(settings, derandomize=True, deadline=None, database=None)
with_files = partial(quickly, suppress_health_check=[HealthCheck.function_scoped_fixture])

whole_text = st.text(st.characters(exclude_categories=["Cs"]))
said = whole_text.filter(lambda text: text.strip())
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | whole_text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(whole_text, inner, max_size=4),
    max_leaves=20,
)


@quickly(max_examples=60)
@given(json_values, st.booleans())
@example('"[{', False)
@example('\\"[', True)
@example("\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16"), True)
def test_json_within_the_limits_is_read_as_it_is(value, escaped):
    assert parse_json(json.dumps(value, ensure_ascii=escaped)) == value


@quickly(max_examples=60)
@given(st.text(max_size=300) | st.text(max_size=9).map(lambda text: text * 500))
def test_any_text_is_one_printable_line(text):
    line = printable(text)
    assert line.isprintable()
    assert printable(line) == line or len(line) > 2000
    assert printable("".join(filter(str.isprintable, text[:1000]))) == "".join(filter(str.isprintable, text[:1000]))


alphas = st.floats(0, 1e6)
phases = st.tuples(alphas, st.integers(1, 10**6).map("{}steps".format) | st.floats(1e-9, 1e6).map("{!r}ep".format))


@quickly(max_examples=60)
@given(st.lists(phases.map(lambda phase: f"{phase[0]!r}@{phase[1]}"), max_size=4), alphas)
def test_schedules_say_themselves(lengthy, last):
    text = ",".join([*lengthy, repr(last)])
    with suppress(ProConError):  # an alpha may be lost in single precision
        schedule = AlphaSchedule.parse(text)
        assert AlphaSchedule.parse(str(schedule)) == schedule
        assert len(schedule.phases) == len(lengthy) + 1


@quickly(max_examples=60)
@given(st.text(max_size=20) | st.lists(st.integers(-5, 50), min_size=1).map(lambda blocks: ", ".join(map(str, blocks))))
def test_blocks_from_a_text_are_blocks(text):
    with suppress(ProConError):
        check_blocks(parse_blocks(text))


@with_files(max_examples=40)
@given(st.lists(said, min_size=1, max_size=5))
def test_prompts_come_back_from_their_file(tmp_path, prompts):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes("\n".join(json.dumps(prompt, ensure_ascii=False) for prompt in prompts).encode())
    assert load_instructions(path) == tuple(prompt.strip() for prompt in prompts)


@with_files(max_examples=40)
@given(st.lists(st.fixed_dictionaries({"prompt": whole_text, "completion": said}), min_size=1, max_size=5))
def test_rows_come_back_from_every_file(tmp_path, rows):
    datasets.disable_progress_bars()
    try:
        for suffix in (".json", ".jsonl", ".csv", ".parquet"):
            path = tmp_path / f"rows{suffix}"
            write(path, rows)
            found = [sample["messages"] for sample in _file_samples(str(path), {}, None)]
            assert [[turn["content"] for turn in turns] for turns in found] == [
                [row["prompt"], row["completion"]] for row in rows
            ]
    finally:
        datasets.enable_progress_bars()


def write(path: Path, rows: list[dict[str, str]]) -> None:
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    elif path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), quoting=csv.QUOTE_ALL)
            writer.writeheader()
            writer.writerows(rows)
    else:
        texts = [json.dumps(row, ensure_ascii=False) for row in rows]
        path.write_bytes(("\n".join(texts) if path.suffix == ".jsonl" else f"[{','.join(texts)}]").encode())


@pytest.mark.filterwarnings("ignore:.*conversations of")
@with_files(max_examples=25)
@given(st.sampled_from([".json", ".jsonl", ".csv", ".parquet", ".txt", ""]), st.binary(max_size=200))
def test_any_bytes_are_conversations_or_one_line(tmp_path, monkeypatch, suffix, content):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path = tmp_path / f"data{suffix}"
    path.write_bytes(content)
    with suppress(ProConError):
        assert len(load_conversations(path)) > 0
