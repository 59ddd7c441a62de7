"""Run files: one process makes a run, a claim goes with whoever made it, and a damaged file is named."""

import json
import multiprocessing
import os
from pathlib import Path

import pytest

from benchmarks.study.record import Cell, claimed, load_run, save_run
from procon.errors import ProConError

CELLS = [Cell("arithmetic", f"method_{number}", 0) for number in range(30)]
WORKERS = 4

#: Forked, so that they need not import everything again.
PROCESSES = multiprocessing.get_context("fork")


@pytest.fixture
def cell() -> Cell:
    return CELLS[0]


def fork(work) -> None:
    """Run ``work(number)`` in as many processes at once, and wait for them."""
    workers = [PROCESSES.Process(target=work, args=(number,)) for number in range(WORKERS)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0


def leave_claims(runs: Path) -> None:
    """Claims of a process that ends without giving them back."""

    def work() -> None:
        held = [claimed(cell.path(runs)) for cell in CELLS]
        os._exit(0 if all(claim.__enter__() for claim in held) else 1)

    worker = PROCESSES.Process(target=work)
    worker.start()
    worker.join()
    assert worker.exitcode == 0
    assert not any(cell.path(runs).exists() for cell in CELLS)


@pytest.mark.parametrize("stale", [False, True], ids=["unclaimed", "claimed by a process that is gone"])
def test_each_run_is_made_by_one_process(tmp_path, stale):
    """All processes reach for the same run at the same time, and each finishes what it may make before the next."""
    runs, barrier = tmp_path / "runs", PROCESSES.Barrier(WORKERS)
    if stale:
        leave_claims(runs)

    def work(number: int) -> None:
        for cell in CELLS:
            barrier.wait(timeout=60)
            with claimed(cell.path(runs)) as mine:
                if mine:
                    (tmp_path / f"{cell.method}.by-{number}").touch()
                    save_run(cell, {"name": cell.method}, {"replies": {}}, runs)

    fork(work)
    makers = [len(list(tmp_path.glob(f"{cell.method}.by-*"))) for cell in CELLS]
    assert makers == [1] * len(CELLS)
    assert not list(runs.rglob("*.claim"))


def test_a_claim_keeps_others_away_until_it_is_given_back(tmp_path, cell):
    path = cell.path(tmp_path)
    with claimed(path) as mine:
        with claimed(path) as also_mine:
            assert (mine, also_mine) == (True, False)
        fork(lambda _: os._exit(claimed(path).__enter__()))
    with claimed(path) as mine:
        assert mine  # nobody made it


def test_a_claim_is_given_back_when_the_work_fails(tmp_path, cell):
    path = cell.path(tmp_path)
    claim = claimed(path)
    assert claim.__enter__()
    assert not claim.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    with claimed(path) as mine:
        assert mine


def test_a_run_that_is_there_is_not_made_again(tmp_path, cell):
    path = save_run(cell, {"name": cell.method}, {"replies": {}}, tmp_path)
    with claimed(path) as mine:
        assert not mine
    assert list(path.parent.iterdir()) == [path]


def test_a_run_file_says_what_it_was_made_by(tmp_path, cell):
    measured = {"replies": {"benign": [{"reply": "Caf\u00e9", "refused": False}]}, "perplexity": 71.5}
    path = save_run(cell, {"name": cell.method}, measured, tmp_path)
    assert path == tmp_path / "arithmetic" / "method_0" / "seed-0.json"
    run = load_run(path)
    assert run == {"setting": "arithmetic", "method": {"name": "method_0"}, "seed": 0, "made": run["made"], **measured}
    assert {"date", "machine", "torch", "transformers", "peft", "commit"} <= run["made"].keys()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (b"", "is damaged"),
        (b'{"replies": {"benign": [', "is damaged"),
        (b"[1, 2]", "is damaged"),
        (b'"replies"', "is damaged"),
        (b'{"seed": 0}', "no key 'replies'"),
        (b'{"replies": 3}', "is damaged"),
        (json.dumps({"replies": {}}).encode("utf-16"), "is damaged"),
    ],
)
def test_damaged_run_files(tmp_path, content, message):
    path = tmp_path / "seed-0.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ProConError, match=message) as caught:
        load_run(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
