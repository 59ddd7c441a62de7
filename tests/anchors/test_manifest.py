"""What a folder of anchors says of itself comes back as it was written, or is said to be wrong."""

import json
from pathlib import Path

import pytest

from procon.anchors.manifest import FORMAT, MANIFEST, Manifest
from procon.errors import ProConError
from procon.files import json_checksum

FINGERPRINT = "0123456789abcdef"
GOOD = Manifest(FINGERPRINT, (0, 2, 5), "response", 2)


def rewrite(folder: Path, right_checksum: bool = True, **changes) -> None:
    """The manifest with other values; None takes one away."""
    content = {**json.loads((folder / MANIFEST).read_text()), **changes}
    content = {name: value for name, value in content.items() if value is not None}
    if right_checksum:
        content["checksum"] = json_checksum({name: value for name, value in content.items() if name != "checksum"})
    (folder / MANIFEST).write_text(json.dumps(content))


@pytest.mark.parametrize("manifest", [GOOD, Manifest(FINGERPRINT, (), "all"), Manifest("f" * 16, (7,), "prompt", 8)])
def test_it_comes_back(tmp_path, manifest):
    manifest.write(tmp_path)
    assert Manifest.read(tmp_path) == Manifest.read_if_whole(tmp_path) == manifest
    assert [file.name for file in tmp_path.iterdir()] == [MANIFEST]


def test_columns_are_of_blocks_and_directions():
    assert GOOD.columns == 6
    assert Manifest(FINGERPRINT, (1, 2), "all").columns == 2


def test_it_is_one_manifest_however_its_text_is_written(tmp_path):
    GOOD.write(tmp_path)
    content = json.loads((tmp_path / MANIFEST).read_text())
    (tmp_path / MANIFEST).write_text(json.dumps(dict(reversed(content.items()))))
    assert Manifest.read(tmp_path) == GOOD


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"fingerprint": "0123456789abcde"}, "fingerprint is '0123456789abcde', not 16 hexadecimal digits"),
        ({"fingerprint": "0123456789ABCDEF"}, "not 16 hexadecimal digits"),
        ({"fingerprint": "0123456789abcdef0"}, "not 16 hexadecimal digits"),
        ({"fingerprint": 16}, "fingerprint is 16, not"),
        ({"blocks": (1, -1)}, r"blocks are \[1, -1\], not indices"),
        ({"blocks": (1.0,)}, "not indices"),
        ({"blocks": (True,)}, "not indices"),
        ({"scope": "answers"}, "scope is 'answers'"),
        ({"k": 0}, "k is 0, not 1 to 8"),
        ({"k": 9}, "k is 9, not 1 to 8"),
        ({"k": 2.0}, "k is 2.0, not 1 to 8"),
        ({"k": True}, "k is True, not 1 to 8"),
    ],
)
def test_values_that_it_cannot_have(values, message):
    with pytest.raises(ValueError, match=message):
        Manifest(**{"fingerprint": FINGERPRINT, "blocks": (0,), "scope": "all", "k": 1, **values})


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({"scope": "all", "right_checksum": False}, "its checksum differs"),
        ({"format": FORMAT + 1, "right_checksum": False}, "its checksum differs"),
        ({"checksum": None, "right_checksum": False}, "its checksum differs"),
        ({"blocks": None}, "no key 'blocks'"),
        ({"k": 9}, "k is 9, not 1 to 8"),
        ({"scope": None}, "scope"),
        ({"more": 1}, "more"),
    ],
)
def test_damage_is_named(tmp_path, changes, wrong):
    GOOD.write(tmp_path)
    rewrite(tmp_path, **changes)
    found = Manifest.read_if_whole(tmp_path)
    assert isinstance(found, str)
    assert wrong in found
    with pytest.raises(
        ProConError, match=r"^anchors manifest in '.*' is damaged \(.*\): record again from the starting"
    ):
        Manifest.read(tmp_path)


@pytest.mark.parametrize(
    ("text", "wrong"), [("[1]", "it holds list"), ("7", "it holds int"), ("{", "Expecting"), ("", "Expecting value")]
)
def test_what_is_no_manifest(tmp_path, text, wrong):
    (tmp_path / MANIFEST).write_text(text)
    assert wrong in Manifest.read_if_whole(tmp_path)


@pytest.mark.parametrize(
    ("changes", "number"),
    [({"format": 3}, 3), ({"format": 1}, 1), ({"format": None, "checksum": None, "right_checksum": False}, 1)],
)
def test_another_version(tmp_path, changes, number):
    GOOD.write(tmp_path)
    rewrite(tmp_path, **changes)
    message = rf"recorded by another version of ProCon \(format {number}, not {FORMAT}\): give another folder"
    with pytest.raises(ProConError, match=message):
        Manifest.read(tmp_path)


def test_a_folder_without(tmp_path):
    with pytest.raises(ProConError, match=r"^no anchors in '.*': record them with Anchors.record before training"):
        Manifest.read(tmp_path)
    (tmp_path / MANIFEST).mkdir()
    with pytest.raises(ProConError, match="is damaged"):
        Manifest.read(tmp_path)
