"""Runs: one process makes a run, a claim goes with whoever made it, and a damaged file is named."""

import lzma
import multiprocessing
import os

import pytest

from benchmarks.study.plan import Cell
from benchmarks.study.record import claimed, load_runs, save_run
from procon.errors import ProConError

CELLS = [Cell("arithmetic", f"method_{number}", 0) for number in range(8)]
WORKERS = 4

#: Forked, so that they need not import everything again.
PROCESSES = multiprocessing.get_context("fork")


def run_of(cell: Cell, **more) -> dict:
    return {"job": cell.job, "method": {"name": cell.method}, "seed": cell.seed, "split": cell.split, **more}


def fork(work) -> None:
    """Run ``work(number)`` in as many processes at once, and wait for them."""
    workers = [PROCESSES.Process(target=work, args=(number,)) for number in range(WORKERS)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0


def test_each_run_is_made_by_one_process(tmp_path):
    """All processes reach for the same run at the same time, beside claims of one that ended without giving them back;
    and no run is lost where several are saved at once."""
    path, barrier = tmp_path / "runs.jsonl.xz", PROCESSES.Barrier(WORKERS)
    fork(lambda number: os._exit(0 if claimed(CELLS[number], path).__enter__() else 1))

    def work(number: int) -> None:
        for cell in CELLS:
            barrier.wait(timeout=60)
            with claimed(cell, path) as mine:
                if mine:
                    (tmp_path / f"{cell.method}.by-{number}").touch()
                    save_run(run_of(cell), path)
        save_run(run_of(Cell("extraction", "plain", number)), path)

    fork(work)
    assert [len(list(tmp_path.glob(f"{cell.method}.by-*"))) for cell in CELLS] == [1] * len(CELLS)
    assert len(load_runs(path)) == len(CELLS) + WORKERS


def test_a_claim_keeps_others_away_until_it_is_given_back(tmp_path):
    cell, path = CELLS[0], tmp_path / "runs.jsonl.xz"
    with claimed(cell, path) as mine:
        with claimed(cell, path) as also_mine:
            assert (mine, also_mine) == (True, False)
        fork(lambda _: os._exit(claimed(cell, path).__enter__()))
    with claimed(cell, path) as mine:
        assert mine  # nobody made it
        save_run(run_of(cell, text="Caf\u00e9"), path)
    with claimed(cell, path) as mine:
        assert not mine
    assert load_runs(path) == {cell: run_of(cell, text="Caf\u00e9")}


@pytest.mark.parametrize("content", [b"", b"{}", lzma.compress(b'{"job": "arithmetic"'), lzma.compress(b"[1, 2]")])
def test_a_damaged_file_is_named(tmp_path, content):
    path = tmp_path / "runs.jsonl.xz"
    path.write_bytes(content)
    with pytest.raises(ProConError, match=r"^file of runs '.*runs\.jsonl\.xz' is damaged: get it again$"):
        load_runs(path)
