"""Every trainer in every mode, in its short form; the whole is ``python tests/trainers_table``."""

import json
import runpy
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

CAMPAIGN = Path(__file__).parents[1] / "trainers_table"

_SPEC = spec_from_file_location("trainers_table_page", CAMPAIGN / "page.py")
page = module_from_spec(_SPEC)
_SPEC.loader.exec_module(page)


@pytest.fixture(scope="module")
def recorded() -> dict:
    return json.loads(page.RECORD.read_text())


@pytest.mark.slow
def test_short_campaign_finds_no_fault(recorded, tmp_path, monkeypatch, capsys):
    pytest.importorskip("trl", reason="most of the rows")
    pytest.importorskip("bitsandbytes", reason="the QLoRA column")
    file = tmp_path / "found.json"
    # In this process, so that its cells are forked from where the other tests' processes are.
    monkeypatch.setattr(sys, "argv", ["trainers_table", "--short", "--output", str(file)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(CAMPAIGN), run_name="__main__")
    assert ended.value.code == 0, capsys.readouterr().err
    found = json.loads(file.read_text())
    assert sum(map(len, found.values())) > 30
    for row, cells in found.items():
        assert set(page.SOURCES) <= cells.keys()
        for column, cell in cells.items():
            before = recorded[row]["cells"][column]
            assert before.get("refused") == cell.get("refused"), f"{row}, {column}: record it"
            assert before.get("none") == cell.get("none") or "error" in cell, f"{row}, {column}: record it"


def test_no_cell_is_blank(recorded):
    assert tuple(recorded) == page.ROWS
    for row in page.ROWS:
        assert tuple(recorded[row]["cells"]) == page.COLUMNS
        for column, cell in recorded[row]["cells"].items():
            assert page.fault(row, cell) is None, f"{row}, {column}"


def test_page_is_the_record(recorded):
    assert page.page(recorded) == page.PAGE.read_text()


@pytest.mark.parametrize(
    "cell",
    [
        {},
        {"refused": ""},
        {"error": 2e-4, "identical": True},
        {"error": float("nan"), "identical": True},
        {"error": 1e-6},
        {"error": 1e-6, "identical": False},
        {"refused": "no:\nnot so", "identical": True},
    ],
)
def test_a_faulty_cell_is_one(cell):
    assert page.fault("DPO", cell)


def test_a_sound_cell_is_none():
    assert page.fault("DPO", {"error": 1e-6, "identical": True}) is None
    assert page.fault("DPO", {"none": "TRL's DPOTrainer has no packing"}) is None
    assert page.fault("bare loop", {"error": 1e-6}) is None
    assert page.fault("DPO", {"error": 1e-6}, compared=False) is None
