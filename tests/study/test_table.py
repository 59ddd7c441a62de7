"""The study's tables: which runs a cell is from, what was not run, and the paper's figures beside them."""

import pytest
from made_up_runs import CONFIRMED, PLAIN, SAFE, START, STRENGTH, TABLE

from benchmarks.study.paper import PAPER
from benchmarks.study.table import NONE, NOT_RUN, Table, cost_table, kept_table


def rows(table: Table) -> dict[str, dict[str, str]]:
    """Cells by method and column; a second column of one name gets a quote mark."""
    header: list[str] = []
    for name in table.header:
        header.append(name + "'" if name in header else name)
    return {row[0]: dict(zip(header, row, strict=True)) for row in table.rows}


def test_what_was_not_run_shows_no_number_of_ours(write, load):
    write("arithmetic", PLAIN, 0, 0.5)
    for table in (kept_table, cost_table):
        cells = rows(table(TABLE, "arithmetic", load()))["IFT_safe"]
        ours = [cell for name, cell in cells.items() if name != "method" and not name.startswith("paper")]
        assert ours == [NOT_RUN] + [NONE] * (len(ours) - 1)


def test_kept_table(write, load):
    for seed in range(3):
        write("arithmetic", PLAIN, seed, 0.5, task=0.75)
    cells = rows(kept_table(TABLE, "arithmetic", load()))["IFT"]
    assert cells["refuses malicious"].startswith("50%<br>")
    # Seeds 0 to 2 refuse prompts 0 to 3, 1 to 4 and 2 to 5: none is the last, which the second judge misses.
    assert cells["second judge"] == cells["refuses malicious"]
    assert cells["log-odds"].startswith("0.0<br>")
    assert cells["refuses benign"].startswith("0%<br>0 to ")
    assert cells["degenerate"] == f"{100 / 16:.0f}%"
    assert cells["task"].startswith("75%<br>")
    assert cells["paper"] == f"{100 - 61.18:.0f}%"
    assert cells["paper'"] == "66%"


def test_the_paper_stands_beside_held_out_runs_alone(write, load):
    write("arithmetic", PLAIN, 9, 0.5, split="validation")
    assert "paper" not in kept_table(STRENGTH, "arithmetic", load()).header
    assert "paper" in kept_table(TABLE, "arithmetic", load()).header
    assert "paper" not in kept_table(CONFIRMED, "arithmetic", load()).header


def test_cost_table(write, load):
    write("arithmetic", START, 0, 1.0)
    write("arithmetic", PLAIN, 0, 0.5, seconds=100.0)
    write("arithmetic", PLAIN, 1, 0.5, seconds=300.4)
    write("arithmetic", SAFE, 0, 0.5, seconds=150.0)
    write("arithmetic", SAFE, 1, 0.5, seconds=150.3)
    cells = rows(cost_table(TABLE, "arithmetic", load()))
    assert cells["IFT"]["time"] == "100 to 300 s"
    assert cells["IFT_safe"]["time"] == "150 s"
    assert cells["IFT_safe"]["seeds"] == "2 of 3"
    assert cells["start"]["time"] == cells["start"]["memory"] == cells["start"]["seeds"] == NONE
    assert (
        cells["IFT"]
        | {
            "perplexity": "12.5",
            "cosine": "0.700",
            "shift": "-0.75",
            "off r": "0.30",
            "share along r": "30.0%",
            "memory": "2.00 GB",
        }
        == cells["IFT"]
    )


def test_paper_has_its_tables():
    """Spot checks against arXiv 2509.06795, Tables I, III, IV and V."""
    assert PAPER["arithmetic"]["procon_wu_safe"].refusal == pytest.approx(87.12)
    assert PAPER["arithmetic"]["last_block"].table == "Table V"
    assert PAPER["poisoned"]["plain"].asr == 67.06
    assert PAPER["extraction"]["procon_wu_safe"].task == 32.0


def test_a_table_is_of_its_parts_split_alone(write, load):
    write("arithmetic", PLAIN, 0, 0.5)
    before = kept_table(TABLE, "arithmetic", load()), cost_table(TABLE, "arithmetic", load())
    write("arithmetic", PLAIN, 9, 1.0, split="validation", seconds=7.0)
    assert (kept_table(TABLE, "arithmetic", load()), cost_table(TABLE, "arithmetic", load())) == before
