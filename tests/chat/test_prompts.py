"""Built-in prompts: how many, whose twins, and that no measuring prompt is trained on; prompt files of the user's."""

import json
import re
from collections import Counter
from collections.abc import Iterable
from difflib import SequenceMatcher
from typing import get_args

import pytest

from procon.chat import (
    ContrastPrompts,
    Split,
    builtin_drift_pairs,
    builtin_probe_pairs,
    builtin_prompts,
    builtin_refusals,
    is_refusal,
    load_instructions,
)
from procon.chat.prompts import asset_lines
from procon.errors import ProConError


def pairs() -> list[dict[str, str]]:
    return asset_lines("pairs.jsonl")


def normalised(text: str) -> str:
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


@pytest.mark.parametrize(
    ("split", "count"), [("extraction", 192), ("validation", 64), ("held_out", 64), ("safety", 720)]
)
def test_counts(split, count):
    prompts = builtin_prompts(split)
    assert len(prompts.malicious) == len(prompts.benign) == count


def test_the_first_rows_cover_the_categories():
    category = {pair["malicious"]: pair["category"] for pair in pairs()}
    assert len(set(category.values())) == 16
    for split in get_args(Split):
        for n in (16, 32, 64):
            counts = Counter(category[prompt] for prompt in builtin_prompts(split).first(n).malicious)
            assert set(counts.values()) == {n // 16}


def test_no_sentence_occurs_twice():
    sentences = [normalised(pair[side]) for pair in pairs() for side in ("malicious", "benign")]
    assert [text for text, count in Counter(sentences).items() if count > 1] == []
    assert len({pair["id"] for pair in pairs()}) == len(pairs())


def near_duplicates(first: Iterable[str], second: Iterable[str]) -> list[tuple[str, str]]:
    """Pairs that share a third of their words and four fifths of their characters, in order."""
    words = {text: set(text.split()) for text in {*first, *second}}
    return [
        (a, b)
        for a in second
        for b in first
        if 3 * len(words[a] & words[b]) > len(words[a] | words[b])
        and SequenceMatcher(a=b, b=a, autojunk=False).ratio() > 0.8
    ]


@pytest.mark.parametrize(
    ("measuring", "used"),
    [
        ("extraction", "safety"),
        ("validation", "safety"),
        ("validation", "extraction"),
        ("held_out", "safety"),
        ("held_out", "extraction"),
        ("held_out", "validation"),
    ],
)
@pytest.mark.parametrize("side", ["malicious", "benign"])
def test_what_measures_is_nearly_nothing_that_was_used_before(measuring, used, side):
    sides = [[normalised(text) for text in getattr(builtin_prompts(split), side)] for split in (used, measuring)]
    assert near_duplicates(*sides) == []


def test_unknown_split():
    with pytest.raises(ProConError, match="'test': choose one of extraction, validation, held_out, safety"):
        builtin_prompts("test")


def test_refusals_are_refusals():
    refusals = builtin_refusals()
    assert len(set(refusals)) == len(refusals) == 48
    assert [text for text in refusals if not is_refusal(text)] == []


def test_hash_tells_wording_order_and_side_apart():
    sides = (("a", "b"), ("c", "d"))
    prompts = ContrastPrompts(*sides)
    others = [
        ContrastPrompts(("a", "x"), ("c", "d")),
        ContrastPrompts(("b", "a"), ("c", "d")),
        ContrastPrompts(("c", "d"), ("a", "b")),
        ContrastPrompts(("a",), ("b", "c", "d")),
    ]
    assert len({prompts.hash, *(other.hash for other in others)}) == 5
    assert ContrastPrompts(*sides).hash == prompts.hash
    assert prompts.first(1) == ContrastPrompts(("a",), ("c",))


@pytest.mark.parametrize("side", ["malicious", "benign"])
def test_an_empty_side_is_refused(side):
    with pytest.raises(ProConError, match=f"no {side} prompts"):
        ContrastPrompts(**({"malicious": ("a",), "benign": ("b",)} | {side: ()}))


PROMPTS = ("Say \u201chi\u201d", "Sing, please")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.txt", "Say \u201chi\u201d  \n\n  Sing, please\n"),
        ("p.txt", "\ufeffSay \u201chi\u201d\r\nSing, please"),
        ("p.jsonl", '{"instruction": "Say \u201chi\u201d", "prompt": "other"}\n\n{"prompt": "Sing, please", "n": 1}\n'),
        ("p.jsonl", '"Say \\u201chi\\u201d"\n"Sing, please"'),
        ("p.json", json.dumps([{"instruction": PROMPTS[0]}, PROMPTS[1], " "])),
        ("P.TXT", "Say \u201chi\u201d\nSing, please"),
    ],
)
def test_prompt_files(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    assert load_instructions(path) == load_instructions(str(path)) == PROMPTS


def test_line_separators_within_json_are_text(tmp_path):
    (tmp_path / "p.jsonl").write_bytes('"a\u2028b\u0085c"\r\n{"prompt": "d"}'.encode())
    assert load_instructions(tmp_path / "p.jsonl") == ("a\u2028b\u0085c", "d")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.jsonl", b'{"text": "a"}', "row 1: no key 'instruction' or 'prompt'"),
        ("p.jsonl", b'{"prompt": "a"}\n{"instruction": 3}', "row 2: no key"),
        ("p.jsonl", b'{"prompt": "a"}\n7', "row 2: no key"),
        ("p.jsonl", b'{"prompt": ', "cannot be read .row 1: .* give UTF-8 text or JSON"),
        ("p.csv", b"prompt\nSing", "cannot be read .row 1: "),
        ("p.json", b"[]", "holds no prompts"),
        ("p.txt", b" \n\n", "holds no prompts"),
        ("p.txt", b"caf\xe9", "cannot be read"),
        ("p.txt", None, "does not exist"),
        ("p.json", b"[" * 20_000, "cannot be read"),
        ("p.jsonl", b'"a"\n' + b"9" * 5000, "cannot be read .row 2: "),
    ],
)
def test_bad_prompt_files_are_named_in_one_line(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ProConError, match=message) as caught:
        load_instructions(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_drift_is_not_measured_on_what_is_kept():
    probes, pairs, extraction = builtin_probe_pairs().malicious, builtin_drift_pairs(), builtin_prompts("extraction")
    assert len(probes) == 128
    assert not set(probes) & set(pairs.malicious)
    assert {*probes, *pairs.malicious} == set(extraction.malicious)
    category = dict(zip(extraction.malicious, extraction.categories, strict=True))
    assert max(Counter(category[prompt] for prompt in probes[:16]).values()) == 1
