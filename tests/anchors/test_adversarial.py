"""Files of anchors that hold anything: an error of one line, or exactly what was recorded."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from procon.anchors import Anchors
from procon.anchors.manifest import FORMAT, MANIFEST, Manifest
from procon.anchors.shards import AnchorShards, ShardWriter
from procon.errors import ProConError
from procon.files import json_checksum

STATE, COLUMNS = "0123456789abcdef", 3
SEQUENCES = {(2**64 - 1 - n, n): np.arange(n * COLUMNS, dtype=np.float32).reshape(n, COLUMNS) + n for n in range(5)}

quick = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

texts = st.text(max_size=8) | st.sampled_from(
    ["F32", "U64", "I64", "keys", "offsets", "checksums", "projections", "__metadata__", "shape", "dtype", STATE]
)
numbers = st.integers(-(2**70), 2**70) | st.integers(0, 200)
values = st.recursive(
    st.none() | st.booleans() | numbers | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=12,
)
entries = st.fixed_dictionaries(
    {"dtype": st.sampled_from(["F32", "U64", "I64"]) | values, "shape": st.lists(numbers, max_size=3) | values},
    optional={"data_offsets": st.lists(numbers, min_size=2, max_size=2) | values},
)
headers = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(("keys", "offsets", "checksums", "projections"), entries),
        "__metadata__": st.fixed_dictionaries({"fingerprint": st.just(STATE), "index": texts}) | values,
    },
)
edits = st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), min_size=1, max_size=6)


@pytest.fixture
def file(tmp_path):
    writer = ShardWriter(tmp_path, STATE)
    for key, rows in SEQUENCES.items():
        writer.add(key, rows)
    writer.flush()
    (file,) = tmp_path.iterdir()
    return file


def edited(data: bytes, changes: list[tuple[int, int]]) -> bytes:
    changed = bytearray(data)
    for place, byte in changes:
        changed[place % len(data)] = byte
    return bytes(changed)


def refusal(read: Callable[[], Any]) -> tuple[Any, str]:
    """What is read, and an empty text; or None and the error."""
    try:
        return read(), ""
    except ProConError as error:
        return None, str(error)


@quick
@given(changes=edits)
def test_a_file_with_other_bytes(file, changes):
    before = file.read_bytes()
    file.write_bytes(edited(before, changes))

    def read() -> dict:
        shards = AnchorShards(file.parent, STATE, COLUMNS)
        return {key: shards.read(key) for key in SEQUENCES}

    found, message = refusal(read)
    if found is None:
        assert "is damaged (" in message
        assert "\n" not in message
    else:
        assert all(np.array_equal(found[key], rows) for key, rows in SEQUENCES.items())
    file.write_bytes(before)


@quick
@given(header=headers | values, body=st.binary(max_size=64), declared=st.none() | st.integers(0, 2**64 - 1))
def test_a_file_with_any_header(file, header, body, declared):
    text = json.dumps(header).encode()
    before = file.read_bytes()
    file.write_bytes((len(text) if declared is None else declared).to_bytes(8, "little") + text + body)
    with pytest.raises(ProConError, match=r"is damaged \("):
        AnchorShards(file.parent, STATE, COLUMNS)
    file.write_bytes(before)


@quick
@given(data=st.binary(max_size=200))
def test_any_bytes(file, data):
    file.write_bytes(data)
    (file.parent / MANIFEST).write_bytes(data)
    with pytest.raises(ProConError, match="is damaged"):
        AnchorShards(file.parent, STATE, COLUMNS)
    with pytest.raises(ProConError, match="is damaged"):
        Anchors(file.parent)


@quick
@given(content=values, sealed=st.booleans())
def test_a_manifest_with_any_content(tmp_path, content, sealed):
    """Also one whose checksum somebody made."""
    if isinstance(content, dict) and sealed:
        content = {"format": FORMAT, "fingerprint": STATE, "blocks": [0], "scope": "all", "k": 1, **content}
        content.pop("checksum", None)
        content["checksum"] = json_checksum(content)
    (tmp_path / MANIFEST).write_text(json.dumps(content))
    found, message = refusal(lambda: Manifest.read(tmp_path))
    assert "\n" not in message
    assert found is None or found.columns == len(found.blocks) * found.k


@quick
@given(changes=edits)
def test_a_manifest_with_other_bytes(tmp_path, changes):
    manifest, path = Manifest(STATE, (0, 2), "all", 2), tmp_path / MANIFEST
    if not path.exists():
        manifest.write(tmp_path)
    before = path.read_bytes()
    path.write_bytes(edited(before, changes))
    found, message = refusal(lambda: Manifest.read(tmp_path))
    assert found == manifest or "is damaged" in message
    path.write_bytes(before)
