"""The study's tables: which runs a cell is from, what was not run, and the paper's figures beside them."""

import pytest
from made_up_runs import CONFIRMED, PLAIN, SAFE, START, STRENGTH, TABLE

from benchmarks.study.paper import PAPER
from benchmarks.study.table import (
    NONE,
    NOT_RUN,
    Table,
    cost_table,
    folded,
    judged_table,
    kept_table,
    moved_table,
    paper_table,
)

OURS = (kept_table, judged_table, moved_table, cost_table)


def rows(table: Table) -> dict[str, dict[str, str]]:
    """Cells by method and column."""
    return {row[0]: dict(zip(table.header, row, strict=True)) for row in table.rows}


def test_what_was_not_run_shows_no_number_of_ours(write, load):
    write("arithmetic", PLAIN, 0, 0.5)
    for table in OURS:
        _, *cells = rows(table(TABLE, "arithmetic", load()))["IFT_safe"].values()
        assert cells == [NOT_RUN] + [NONE] * (len(cells) - 1)


def test_kept_table(write, load):
    for seed in range(3):
        write("arithmetic", PLAIN, seed, 0.5, task=0.75)
    kept, judged = (rows(table(TABLE, "arithmetic", load()))["IFT"] for table in (kept_table, judged_table))
    assert kept["refuses malicious"].startswith("50%<br>")
    assert kept["refuses benign"].startswith("0%<br>0 to ")
    assert kept["task"].startswith("75%<br>")
    # Seeds 0 to 2 refuse prompts 0 to 3, 1 to 4 and 2 to 5: none is the last, which the second judge misses.
    assert judged["second judge"] == kept["refuses malicious"]
    assert judged["log-odds"].startswith("0.0<br>")
    assert judged["degenerate"] == f"{100 / 16:.0f}%"


def test_no_table_is_wider_than_a_phone(write, load):
    write("arithmetic", PLAIN, 0, 0.5)
    for table in OURS:
        assert len(table(TABLE, "arithmetic", load()).header) <= 5


def test_numbers_are_to_the_right():
    table = Table(
        ["", "a", "b", "c", "d"],
        [["1", "+1.5<br>1 to 2", "words", "-", "**9%**"], ["2", NOT_RUN, "2 words", "< 0.1", ".5 GB"]],
    )
    assert table.markdown().splitlines()[1] == "| --- | ---: | --- | ---: | ---: |"


def test_what_is_folded():
    assert folded("More", "| a |", "", "words") == (
        "<details markdown><summary>More</summary>\n\n| a |\n\nwords\n\n</details>"
    )
    assert folded("More", "") == ""


def test_the_paper_stands_beside_held_out_runs_alone():
    cells = rows(paper_table(TABLE, "arithmetic"))["IFT"]
    assert cells == {"in the paper": "IFT", "refuses malicious": f"{100 - 61.18:.0f}%", "task": "66%"}
    assert paper_table(STRENGTH, "arithmetic") is None
    assert paper_table(CONFIRMED, "arithmetic") is None


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
    assert (cells["IFT"]["perplexity"], cells["IFT"]["memory"]) == ("12.5", "2.00 GB")
    moved = rows(moved_table(TABLE, "arithmetic", load()))["IFT"]
    assert list(moved.values()) == ["IFT", "0.700", "-0.75", "0.30", "30.0%"]


def test_paper_has_its_tables():
    """Spot checks against arXiv 2509.06795, Tables I, III, IV and V."""
    assert PAPER["arithmetic"]["procon_wu_safe"].refusal == pytest.approx(87.12)
    assert PAPER["arithmetic"]["last_block"].table == "Table V"
    assert PAPER["poisoned"]["plain"].asr == 67.06
    assert PAPER["extraction"]["procon_wu_safe"].task == 32.0


def test_a_table_is_of_its_parts_split_alone(write, load):
    write("arithmetic", PLAIN, 0, 0.5)
    before = [table(TABLE, "arithmetic", load()) for table in OURS]
    write("arithmetic", PLAIN, 9, 1.0, split="validation", seconds=7.0)
    assert [table(TABLE, "arithmetic", load()) for table in OURS] == before
