"""The pages of results are, byte for byte, what their command makes of the runs that are there."""

from pathlib import Path

import pytest

from benchmarks.study import report

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("budget", [pytest.param("table", marks=pytest.mark.slow), *report.PAGES, "preferences"])
def test_pages(budget, tmp_path):
    if budget == "preferences":
        pytest.importorskip("trl", reason="TRL is not installed")
    assert report.main(["--budget", budget, "--output", str(tmp_path)]) == 0
    files = [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 2
    assert [str(name) for name in files if (tmp_path / name).read_bytes() != (DOCS / name).read_bytes()] == []
    (figures,) = (tmp_path / "assets").iterdir()
    assert {path.name for path in figures.iterdir()} == {
        path.name for path in (DOCS / "assets" / figures.name).iterdir()
    }
