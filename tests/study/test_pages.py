"""The page of results is, byte for byte, what its command makes of the runs; all tables of a budget can be made."""

import re
from pathlib import Path

import pytest

from benchmarks.study import report

DOCS = Path(__file__).parents[2] / "docs"


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_results(tmp_path):
    assert report.main(["--output", str(tmp_path)]) == 0
    page = DOCS / "results.md"
    assert files(tmp_path) == {page.name: page.read_bytes()} | files(DOCS / "assets" / "hard")
    text = page.read_text(encoding="utf-8")
    assert len(text.split()) <= 2500
    assert len(re.findall(r"^\| ---", text, re.MULTILINE)) <= 6
    assert text.count("![") <= 3


def test_all_of_a_budget(tmp_path, capsys):
    assert report.main(["--budget", "qwen", "--output", str(tmp_path)]) == 0
    text = (tmp_path / "qwen.md").read_text(encoding="utf-8")
    shown = re.findall(r"\]\((qwen/[^)]+)\)", text)
    assert shown
    assert all((tmp_path / name).is_file() for name in shown)
    assert "| last states and training tokens, 4x | 53%<br>" in text

    assert report.main(["--budget", "qwen"]) == 2
    assert "give --output FOLDER" in capsys.readouterr().err
    assert report.main(["--budget", "smoke", "--output", str(tmp_path)]) == 2
    assert "choose one of table" in capsys.readouterr().err
