"""Three gloo ranks on two hosts: every file of any host is on both afterwards, and nothing is sent without need.

A folder of its own stands for a host's file system: ranks 0 and 1 share one, rank 2 has another.
"""

import json
import textwrap
from pathlib import Path

import pytest
from forked import run_ranks

from procon.anchors.exchange import gather, on_all_ranks, once_per_host, own_rank, share_files

WORKER = textwrap.dedent(
    """
    import json, os, sys
    from pathlib import Path
    import torch.distributed as dist
    from procon.anchors import exchange
    from procon.anchors.exchange import on_all_ranks, once_per_host, share_files
    from procon.errors import ProConError

    root, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    dist.init_process_group("gloo")
    exchange.PIECE_BYTES = 64
    sent = []
    broadcast = dist.broadcast_object_list

    def counted(pieces, src):
        broadcast(pieces, src=src)
        sent.append(len(pieces[0]))

    dist.broadcast_object_list = counted
    found = {}
    for case in ("apart", "again", "shared", "conflict"):
        host = "one" if rank < 2 or case == "shared" else "two"
        folder = root / ("apart" if case == "again" else case) / host
        sent.clear()
        try:
            share_files(folder, "*.bin")
            error = None
        except ProConError as raised:
            error = str(raised)
        found[case] = {"sent": list(sent), "error": error}

    def fail_on(failing):
        def act():
            if rank == failing:
                raise ProConError(f"rank {failing} failed")
            return rank

        return act

    found["once"] = once_per_host(root / "apart" / ("one" if rank < 2 else "two"), fail_on(None))
    found["own"] = on_all_ranks(fail_on(None))
    found["errors"] = []
    for attempt in (lambda: on_all_ranks(fail_on(1)), lambda: once_per_host(root / "shared" / "one", fail_on(0))):
        try:
            attempt()
        except ProConError as raised:
            found["errors"].append(str(raised))
    (root / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()
    """
)

APART = {
    "one": {"a.bin": bytes(range(256)), "b.bin": b"7 bytes", "empty.bin": b"", "both.bin": b"x" * 99},
    "two": {"c.bin": b"y" * 150, "both.bin": b"x" * 99, "other.txt": b"stays"},
}


def write(folder: Path, files: dict[str, bytes]) -> None:
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def read(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    root = tmp_path_factory.mktemp("exchange")
    for host, files in APART.items():
        write(root / "apart" / host, files)
    write(root / "shared" / "one", APART["one"])
    write(root / "conflict" / "one", {"a.bin": b"12", "b.bin": b"1"})
    write(root / "conflict" / "two", {"a.bin": b"123"})
    script = root / "worker.py"
    script.write_text(WORKER)
    run_ranks(3, script, root)
    return root, [json.loads((root / f"{rank}.json").read_text()) for rank in range(3)]


def test_each_host_has_the_files_of_both_and_no_others(shared):
    root, _ = shared
    both = {name: content for files in APART.values() for name, content in files.items() if name.endswith("bin")}
    assert read(root / "apart" / "one") == both
    assert read(root / "apart" / "two") == both | {"other.txt": b"stays"}


def test_only_what_is_lacking_is_sent_in_pieces(shared):
    for found in shared[1]:
        # a and b and the empty file from one host, c from the other; each ends with an empty piece.
        assert found["apart"] == {"sent": [64] * 4 + [0] + [7, 0] + [64, 64, 22, 0] + [0], "error": None}
        assert found["again"] == {"sent": [], "error": None}


def test_nothing_is_sent_within_one_file_system(shared):
    root, ranks = shared
    assert all(found["shared"] == {"sent": [], "error": None} for found in ranks)
    assert read(root / "shared" / "one") == APART["one"]


def test_different_files_of_one_name_stop_all_ranks(shared):
    root, ranks = shared
    for found in ranks:
        assert "the size of 'a.bin' in" in found["conflict"]["error"]
        assert "2 on that of rank 0, 3 on that of rank 2" in found["conflict"]["error"]
        assert found["conflict"]["sent"] == []
    assert read(root / "conflict" / "two") == {"a.bin": b"123"}


def test_what_is_done_once_per_host_is_done_by_its_first_rank(shared):
    for rank, found in enumerate(shared[1]):
        assert found["once"] == [0, 2]
        assert found["own"] == rank


def test_an_error_of_one_rank_stops_all(shared):
    assert [found["errors"] for found in shared[1]] == [["rank 1 failed", "rank 0 failed"]] * 3


def test_one_process_needs_no_group(tmp_path):
    assert on_all_ranks(lambda: 5) == 5
    assert once_per_host(tmp_path / "nowhere", lambda: 5) == [5]
    assert gather("this") == ["this"]
    assert own_rank() == 0
    share_files(tmp_path / "nowhere", "*")
