"""Shards come back as they were written, and one whose parts do not fit is refused even if its checksums are right."""

import contextlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from procon.anchors import shards
from procon.anchors.shards import AnchorShards, DamagedShard, Index, ShardWriter, read_index, shard_files
from procon.errors import ProConError

FINGERPRINT = "00000000000000ab"
COLUMNS = 3
KEYS = [(5, 1), (5, 2), (2**64 - 1, 2**64 - 1), (0, 0)]


def rows(number: int) -> np.ndarray:
    return np.random.default_rng(number).standard_normal((number + 1, COLUMNS)).astype("<f4")


@pytest.fixture
def file(tmp_path) -> Path:
    """Of four sequences, of one to four tokens."""
    writer = ShardWriter(tmp_path, FINGERPRINT)
    for number, key in enumerate(KEYS):
        writer.add(key, rows(number))
    writer.flush()
    (found,) = shard_files(tmp_path, FINGERPRINT)
    return found


@pytest.fixture
def rewrite(file) -> Callable[..., None]:
    """The file with other tensors or another fingerprint, and checksums that are right."""

    def change(fingerprint: str = FINGERPRINT, columns: int | None = None, **changes: np.ndarray) -> None:
        tensors = {**load_file(file), **changes}
        index = Index(tensors["keys"], tensors["offsets"], tensors["checksums"])
        columns = tensors["projections"].shape[-1] if columns is None else columns
        save_file(tensors, file, {"fingerprint": fingerprint, "index": index.checksum(fingerprint, columns)})

    return change


def test_each_sequence_comes_back(file):
    opened = AnchorShards(file.parent, FINGERPRINT, COLUMNS)
    assert len(opened) == 4
    for number, key in enumerate(KEYS):
        assert key in opened
        assert np.array_equal(opened.read(key), rows(number))
    assert (5, 3) not in opened
    assert opened.read((5, 3)) is None
    assert opened.has_tokens((5, 3))
    assert not opened.has_tokens((6, 1))
    index = read_index(file, FINGERPRINT, COLUMNS)
    assert [tuple(key) for key in index.keys.tolist()] == KEYS
    assert index.offsets.tolist() == [0, 1, 3, 6, 10]
    assert all(index.is_whole(number, rows(number), FINGERPRINT) for number in range(4))
    assert not any(index.is_whole(number, rows(number) + 1, FINGERPRINT) for number in range(4))


def test_rows_are_stored_in_float32_whatever_they_are(tmp_path):
    writer = ShardWriter(tmp_path, FINGERPRINT)
    given = np.random.default_rng(0).standard_normal((COLUMNS, 5)).T  # float64, and not contiguous
    writer.add((1, 2), given)
    writer.flush()
    writer.flush()  # nothing has been added since
    found = AnchorShards(tmp_path, FINGERPRINT, COLUMNS).read((1, 2))
    assert found.dtype == np.float32
    assert np.array_equal(found, given.astype(np.float32))
    assert len(shard_files(tmp_path, FINGERPRINT)) == 1


def test_a_sequence_that_is_there_twice_counts_once(tmp_path):
    for others in ([], [(9, 9)]):
        writer = ShardWriter(tmp_path, FINGERPRINT)
        for key in [KEYS[0], *others]:
            writer.add(key, rows(0))
        writer.flush()
    assert len(shard_files(tmp_path, FINGERPRINT)) == 2
    assert len(AnchorShards(tmp_path, FINGERPRINT, COLUMNS)) == 2


def test_a_file_is_written_at_64_mebibytes(tmp_path):
    writer = ShardWriter(tmp_path, FINGERPRINT)
    whole = np.zeros((2**10, 2**14), "<f4")
    writer.add((1, 1), whole[:-1])
    assert not shard_files(tmp_path, FINGERPRINT)
    writer.add((2, 2), whole[:1])
    (found,) = shard_files(tmp_path, FINGERPRINT)
    assert 64 * 2**20 < found.stat().st_size < 64 * 2**20 + 2**12


OFFSETS = {
    "does not begin at 0": [1, 1, 3, 6, 10],
    "goes back": [0, 3, 1, 6, 10],
    "ends early": [0, 1, 3, 6, 9],
    "ends late": [0, 1, 3, 6, 11],
    "is too short": [0, 1, 3, 10],
    "is too long": [0, 1, 3, 6, 10, 10],
}


@pytest.mark.parametrize("case", OFFSETS)
def test_offsets_that_do_not_fit(file, rewrite, case):
    rewrite(offsets=np.array(OFFSETS[case], "<i8"))
    with pytest.raises(DamagedShard, match=r"^its parts do not fit together$"):
        read_index(file, FINGERPRINT, COLUMNS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checksums": np.zeros(3, "<u8")}, "its parts do not fit together"),
        ({"keys": np.zeros((4, 3), "<u8")}, "its parts do not fit together"),
        ({"keys": np.zeros((3, 2), "<u8")}, "its parts do not fit together"),
        ({"projections": np.zeros((10, 4), "<f4")}, "its parts do not fit together"),
        ({"projections": np.zeros((10, 3), "<f8")}, "its header is wrong about projections"),
        ({"projections": np.zeros((10, 3, 1), "<f4")}, "its header is wrong about projections"),
        ({"keys": np.zeros((4, 2), "<i8")}, "its header is wrong about keys"),
        ({"offsets": np.zeros((1, 5), "<i8")}, "its header is wrong about offsets"),
        ({"fingerprint": "f" * 16}, "its fingerprint is 'ffffffffffffffff', so it is of other anchors"),
        ({"columns": 4}, "the checksum of its index differs"),
    ],
)
def test_parts_that_do_not_fit(file, rewrite, changes, message):
    rewrite(**changes)
    with pytest.raises(DamagedShard, match=f"^{message}$"):
        read_index(file, FINGERPRINT, COLUMNS)
    with pytest.raises(
        ProConError, match=rf"^anchor file '.*' is damaged \({message}\): record again from the starting"
    ):
        AnchorShards(file.parent, FINGERPRINT, COLUMNS)


def test_an_empty_file_of_no_sequences(file, rewrite):
    rewrite(
        keys=np.zeros((0, 2), "<u8"),
        offsets=np.zeros(1, "<i8"),
        checksums=np.zeros(0, "<u8"),
        projections=np.zeros((0, COLUMNS), "<f4"),
    )
    with pytest.raises(DamagedShard, match="its parts do not fit together"):
        read_index(file, FINGERPRINT, COLUMNS)


def test_what_is_missing_is_named(file):
    tensors = load_file(file)
    del tensors["checksums"]
    save_file(tensors, file, {"fingerprint": FINGERPRINT, "index": "0" * 16})
    with pytest.raises(DamagedShard, match=r"^no 'checksums'$"):
        read_index(file, FINGERPRINT, COLUMNS)
    file.unlink()
    with pytest.raises(DamagedShard, match=r"^\[Errno 2\] No such file"):
        read_index(file, FINGERPRINT, COLUMNS)


@pytest.mark.parametrize("left", [0, 4, 8, 200, -1])
def test_a_file_that_is_cut_off(file, left):
    file.write_bytes(file.read_bytes()[:left])
    with pytest.raises(DamagedShard):
        read_index(file, FINGERPRINT, COLUMNS)


def test_bytes_beyond_its_end_are_no_part_of_it(file):
    file.write_bytes(file.read_bytes() + b"\0")
    with pytest.raises(DamagedShard, match=r"^its parts do not fit together$"):
        read_index(file, FINGERPRINT, COLUMNS)


def test_a_length_that_is_no_headers(file, monkeypatch):
    data = file.read_bytes()
    for length in (len(data) + 1, 2**63):
        file.write_bytes(length.to_bytes(8, "little") + data[8:])
        with pytest.raises(DamagedShard, match=r"^its header is no header$"):
            read_index(file, FINGERPRINT, COLUMNS)
    file.write_bytes(data)
    monkeypatch.setattr(shards, "_LONGEST_HEADER", 10)
    with pytest.raises(DamagedShard, match=r"^its header is no header$"):
        read_index(file, FINGERPRINT, COLUMNS)


@pytest.mark.parametrize("place", range(40))
def test_a_flipped_bit_of_the_projections_is_found_on_reading(file, place):
    size = file.stat().st_size
    with file.open("r+b") as stream:
        stream.seek(size - 1 - 3 * place)
        byte = stream.read(1)[0]
        stream.seek(-1, 1)
        stream.write(bytes([byte ^ 1 << place % 8]))
    opened = AnchorShards(file.parent, FINGERPRINT, COLUMNS)
    found = {}
    for number, key in enumerate(KEYS):
        with contextlib.suppress(ProConError):
            found[number] = opened.read(key)
    assert len(found) == len(KEYS) - 1
    assert all(np.array_equal(each, rows(number)) for number, each in found.items())
