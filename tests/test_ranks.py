"""What ranks and hosts tell each other: a thread stands for a rank, and a folder of its own for a host's disk.

``test_recording.py`` has the same between processes, with torch's own process group.
"""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from procon import ranks
from procon.anchors import Anchors
from procon.data import padding_collator
from procon.errors import ProConError


class Group:
    """Stands in for ``torch.distributed``: every collective call waits for all ranks, and for no rank long."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._barrier = threading.Barrier(count, timeout=20)
        self._shared: list[Any] = [None] * count
        self._thread = threading.local()
        self.sent: list[bytes] = []

    def is_available(self) -> bool:
        return True

    is_initialized = is_available

    def get_rank(self) -> int:
        return self._thread.rank

    def get_world_size(self) -> int:
        return self._count

    def all_gather_object(self, values: list, value: Any) -> None:
        self._shared[self.get_rank()] = value
        self._barrier.wait()
        values[:] = self._shared
        self._barrier.wait()

    def broadcast_object_list(self, values: list, src: int) -> None:
        self._shared[self.get_rank()] = src, list(values)
        self._barrier.wait()
        assert {source for source, _ in self._shared} == {src}, "all ranks name the one that sends"
        _, sent = self._shared[src]
        self._barrier.wait()
        if self.get_rank() == src:
            self.sent += sent
        values[:] = sent
        self._barrier.wait()

    def run(self, action: Callable[[int], Any]) -> list[Any]:
        """What ``action(rank)`` gives on each rank, or the error that it raises."""
        results: list[Any] = [None] * self._count

        def one(rank: int) -> None:
            self._thread.rank = rank
            try:
                results[rank] = action(rank)
            except ProConError as error:
                results[rank] = str(error)
            except BaseException:
                self._barrier.abort()
                raise

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self._count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not self._barrier.broken
        return results


@pytest.fixture
def group(monkeypatch) -> Callable[[int], Group]:
    def make(count: int) -> Group:
        made = Group(count)
        monkeypatch.setattr(ranks, "dist", made)
        return made

    return make


@pytest.fixture
def hosts(tmp_path) -> list[Path]:
    """The folder of each of five ranks, on three hosts."""
    folders = [tmp_path / name / "anchors" for name in ("one", "two", "three")]
    for folder in folders:
        folder.mkdir(parents=True)
    return [folders[host] for host in (0, 1, 0, 2, 1)]


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_an_error_of_one_rank_is_raised_on_all(group):
    def action(rank: int) -> int:
        if rank == 1:
            raise ProConError("disk full")
        return 2 * rank

    assert group(3).run(lambda rank: ranks.gather(10 * rank)) == [[0, 10, 20]] * 3
    assert group(3).run(lambda rank: ranks.on_all_ranks(lambda: 2 * rank)) == [0, 2, 4]
    assert group(3).run(lambda rank: ranks.on_all_ranks(lambda: action(rank))) == ["disk full"] * 3


def test_one_process_needs_no_group(tmp_path):
    assert ranks.on_all_ranks(lambda: 5) == 5
    assert ranks.gather("this") == ["this"]
    ranks.share_files(tmp_path / "nowhere")


def test_every_host_gets_what_any_has(group, hosts):
    one, two, three = hosts[0], hosts[1], hosts[3]
    (one / "a.bin").write_bytes(b"0123456789")
    (two / "b.bin").write_bytes(b"abcd")
    (three / "b.bin").write_bytes(b"abcd")
    (one / "_private").mkdir()
    for folder in (one, two, three):
        (folder / "all.bin").write_bytes(b"")
    made = group(5)
    assert made.run(lambda rank: ranks.share_files(hosts[rank])) == [None] * 5
    (one / "_private").rmdir()
    assert (
        contents(one) == contents(two) == contents(three) == {"a.bin": b"0123456789", "b.bin": b"abcd", "all.bin": b""}
    )
    assert made.sent == [b"0123456789", b"abcd"]  # what all have is not sent, and the rest once


def test_a_disk_that_is_full_stops_all_ranks(group, hosts, monkeypatch):
    (hosts[0] / "a.bin").write_bytes(b"1")

    def full(data: bytes, path: Path) -> None:
        raise ProConError("no space")

    monkeypatch.setattr(ranks, "write_bytes", full)
    assert group(5).run(lambda rank: ranks.share_files(hosts[rank])) == ["no space"] * 5


def test_nothing_is_sent_within_one_file_system(group, hosts):
    (hosts[0] / "a.bin").write_bytes(b"1")
    made = group(3)
    made.run(lambda rank: ranks.share_files(hosts[0]))
    assert not made.sent


def test_a_recording_is_on_every_host(group, hosts, tiny_model, tokenizer, random_directions, samples):
    collate = padding_collator(tokenizer)
    models = [tiny_model(), tiny_model()]
    directions, forwards = random_directions(models[0]), []
    for model in models:
        model.model.register_forward_pre_hook(lambda *_: forwards.append(1))

    def record(folders: list[Path], parts: list[list[dict]]) -> list[Anchors]:
        loaders = [[collate([dict(sample) for sample in part])] for part in parts]
        settings = {"scope": "response", "progress": False}
        return group(2).run(
            lambda rank: Anchors.record(models[rank], loaders[rank], directions, folders[rank], **settings)
        )

    both = record([hosts[0], hosts[1]], [samples[:2], samples[2:4]])
    assert [len(anchors) for anchors in both] == [4, 4]
    assert contents(hosts[0]) == contents(hosts[1])
    assert len(forwards) == 4  # one of a token on each rank, which shows the precision
    # A host that takes another's place gets what there is instead of recording it again.
    replaced = record([hosts[0], hosts[3]], [samples[:2], samples[2:4]])
    assert [len(anchors) for anchors in replaced] == [4, 4]
    assert len(forwards) == 6
    other, state = hosts[3].parent / "new" / "folder", both[0].fingerprint
    reopened = group(2).run(lambda rank: Anchors.reopen([hosts[0], other][rank], state))
    assert [len(anchors) for anchors in reopened] == [4, 4]
    assert contents(other) == contents(hosts[0])
    for path, given, message in ((other, "f" * 16, "have the fingerprint"), (other / "none", state, "no anchors in")):
        found = group(2).run(lambda rank, path=path, given=given: Anchors.reopen(path, given))
        assert all(message in error for error in found)
