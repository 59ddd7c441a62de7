"""Files of directions that hold anything: an error of one line, or exactly what was saved."""

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from procon.directions import Directions
from procon.errors import ProConError

quick = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

NAMES = ["basis", "gaps", "auroc", "positive", "negative"]

texts = st.text(max_size=8) | st.sampled_from([*NAMES, "concepts", "__metadata__", "procon", "checksum", "F32"])
numbers = st.integers(-(2**70), 2**70) | st.integers(0, 200)
values = st.recursive(
    st.none() | st.booleans() | numbers | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=12,
)
dtypes = st.sampled_from(["F32", "F16", "BF16", "F64", "F8_E4M3", "I64", "BOOL", "C64", "X"])
entries = st.fixed_dictionaries(
    {"dtype": dtypes | values, "shape": st.lists(numbers, max_size=3) | values},
    optional={"data_offsets": st.lists(numbers, min_size=2, max_size=2) | values},
)
abouts = st.fixed_dictionaries(dict.fromkeys(["concepts", "provenance", "last_output", "checksum"], values)) | values
metadata = st.fixed_dictionaries({}, optional={"procon": texts | abouts.map(json.dumps)}) | values


@pytest.fixture
def saved(tmp_path):
    found = Directions(torch.eye(2, 8)[:, None], *torch.ones(4, 2, 1), provenance={"model": "tiny"})
    return found, found.save(tmp_path / "d.safetensors")


def load_or_refuse(path) -> Directions | None:
    try:
        return Directions.load(path)
    except ProConError as error:
        message = str(error)
    assert "directions file" in message
    assert "\n" not in message
    return None


@quick
@given(changes=st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), min_size=1, max_size=6))
def test_a_file_with_other_bytes(saved, changes):
    found, path = saved
    before = path.read_bytes()
    changed = bytearray(before)
    for place, byte in changes:
        changed[place % len(before)] = byte
    path.write_bytes(changed)
    loaded = load_or_refuse(path)
    assert loaded is None or (loaded.hash == found.hash and loaded.provenance == found.provenance)
    path.write_bytes(before)


@quick
@given(
    tensors=st.fixed_dictionaries(dict.fromkeys(NAMES, entries), optional={"x": entries}) | values,
    about=metadata,
    body=st.binary(max_size=200),
    declared=st.none() | st.integers(0, 2**64 - 1),
)
def test_a_file_with_any_header(tmp_path, tensors, about, body, declared):
    header = {**tensors, "__metadata__": about} if isinstance(tensors, dict) else tensors
    text = json.dumps(header).encode()
    path = tmp_path / "d.safetensors"
    path.write_bytes((len(text) if declared is None else declared).to_bytes(8, "little") + text + body)
    load_or_refuse(path)


@quick
@given(shapes=st.lists(st.lists(st.integers(0, 3), max_size=3), min_size=5, max_size=6), dtype=dtypes, about=metadata)
def test_a_file_of_tensors_of_any_shape(tmp_path, shapes, dtype, about):
    """Whose bytes are there, so that it is read to the end."""
    sizes = {"F64": 8, "I64": 8, "C64": 8, "F32": 4, "F16": 2, "BF16": 2}
    header, place = {"__metadata__": about}, 0
    for name, shape in zip([*NAMES, "x"], shapes, strict=False):
        size = sizes.get(dtype, 1) * int(torch.tensor(shape, dtype=torch.int64).prod())
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [place, place + size]}
        place += size
    text = json.dumps(header).encode()
    path = tmp_path / "d.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes([63]) * place)
    load_or_refuse(path)


@quick
@given(data=st.binary(max_size=200))
def test_any_bytes(tmp_path, data):
    path = tmp_path / "d.safetensors"
    path.write_bytes(data)
    assert load_or_refuse(path) is None
