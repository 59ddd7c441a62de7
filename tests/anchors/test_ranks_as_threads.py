"""What ranks and hosts tell each other, with a thread for each rank and a folder for each host.

``test_exchange.py`` has the same between processes, with torch's own process group.
"""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from procon.anchors import Anchors, exchange
from procon.data import padding_collator
from procon.errors import ProConError


class Ranks:
    """Stands in for ``torch.distributed``: every collective call waits for all ranks, and for no rank long."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._barrier = threading.Barrier(count, timeout=5)
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
        sources = {source for source, _ in self._shared}
        _, sent = self._shared[src]
        self._barrier.wait()
        assert sources == {src}, "all ranks name the one that sends"
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
def ranks(monkeypatch) -> Callable[[int], Ranks]:
    def make(count: int) -> Ranks:
        made = Ranks(count)
        monkeypatch.setattr(exchange, "dist", made)
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


def test_values_come_in_the_order_of_the_ranks(ranks):
    assert ranks(3).run(lambda rank: exchange.gather(10 * rank)) == [[0, 10, 20]] * 3
    assert ranks(3).run(lambda rank: exchange.own_rank()) == [0, 1, 2]
    assert ranks(1).run(lambda rank: (exchange.gather(7), exchange.own_rank())) == [([7], 0)]


def test_an_error_of_one_rank_is_raised_on_all(ranks):
    def action(rank: int) -> int:
        if rank == 1:
            raise ProConError("disk full")
        return rank

    assert ranks(3).run(lambda rank: exchange.on_all_ranks(lambda: 2 * rank)) == [0, 2, 4]
    assert ranks(3).run(lambda rank: exchange.on_all_ranks(lambda: action(rank))) == ["disk full"] * 3
    assert ranks(1).run(lambda rank: exchange.on_all_ranks(lambda: action(1))) == ["disk full"]


def test_one_rank_of_each_host_acts(ranks, hosts):
    acted = []

    def action(rank: int) -> str:
        acted.append(rank)
        return hosts[rank].parent.name

    found = ranks(5).run(lambda rank: exchange.once_per_host(hosts[rank], lambda: action(rank)))
    assert found == [["one", "two", "three"]] * 5
    assert sorted(acted) == [0, 1, 3]
    assert not any(list(folder.iterdir()) for folder in hosts)  # no marks are left
    assert ranks(1).run(lambda rank: exchange.once_per_host(hosts[0], lambda: 5)) == [[5]]


def test_an_error_on_one_host_is_raised_on_all(ranks, hosts):
    def action(rank: int) -> None:
        if rank == 3:
            raise ProConError("read-only")

    found = ranks(5).run(lambda rank: exchange.once_per_host(hosts[rank], lambda: action(rank)))
    assert found == ["read-only"] * 5


def test_every_host_gets_what_any_has(ranks, hosts, monkeypatch):
    monkeypatch.setattr(exchange, "PIECE_BYTES", 4)
    one, two, three = hosts[0], hosts[1], hosts[3]
    (one / "a.bin").write_bytes(b"0123456789")
    (two / "b.bin").write_bytes(b"abcd")
    (three / "b.bin").write_bytes(b"abcd")
    (three / "c.txt").write_bytes(b"not of the pattern")
    for folder in (one, two, three):
        (folder / "all.bin").write_bytes(b"")
    group = ranks(5)
    assert group.run(lambda rank: exchange.share_files(hosts[rank], "*.bin")) == [None] * 5
    everything = {"a.bin": b"0123456789", "b.bin": b"abcd", "all.bin": b""}
    assert contents(one) == contents(two) == everything
    assert contents(three) == everything | {"c.txt": b"not of the pattern"}
    # What all have is not sent, and what is sent is sent once, in pieces.
    assert group.sent == [b"0123", b"4567", b"89", b"", b"abcd", b""]


def test_nothing_is_sent_within_one_file_system(ranks, hosts):
    (hosts[0] / "a.bin").write_bytes(b"1")
    group = ranks(3)
    group.run(lambda rank: exchange.share_files(hosts[0], "*"))
    assert not group.sent
    alone = ranks(1)
    alone.run(lambda rank: exchange.share_files(hosts[0], "*"))
    assert not alone.sent
    assert contents(hosts[0]) == {"a.bin": b"1"}


def test_files_of_one_name_and_other_sizes_are_refused(ranks, hosts):
    one, two, three = hosts[0], hosts[1], hosts[3]
    for folder, text in ((one, b"1"), (two, b"22"), (three, b"1")):
        (folder / "a.bin").write_bytes(text)
    found = ranks(5).run(lambda rank: exchange.share_files(hosts[rank], "*"))
    sizes = r"1 on that of rank 0, 2 on that of rank 1, 1 on that of rank 3"
    for rank, message in enumerate(found):
        where = f"the size of 'a.bin' in {str(hosts[rank])!r} depends on the host ({sizes}): delete it from all of them"
        assert message == where


def test_two_hosts_of_one_rank_each(ranks, hosts):
    (hosts[1] / "a.bin").write_bytes(b"1")
    folders = [hosts[0], hosts[1]]
    ranks(2).run(lambda rank: exchange.share_files(folders[rank], "*"))
    assert contents(hosts[0]) == contents(hosts[1]) == {"a.bin": b"1"}


def test_a_recording_is_on_every_host(ranks, hosts, tiny_model, tokenizer, random_directions, samples):
    collate = padding_collator(tokenizer)
    models = [tiny_model(), tiny_model()]
    directions, forwards = random_directions(models[0]), []
    for model in models:
        model.model.register_forward_pre_hook(lambda *_: forwards.append(1))

    def record(folders: list[Path], parts: list[list[dict]]) -> list[Anchors]:
        loaders = [[collate([dict(sample) for sample in part])] for part in parts]
        settings = {"scope": "response", "progress": False}
        return ranks(2).run(
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
    other = hosts[3].parent / "new" / "folder"
    reopened = ranks(2).run(lambda rank: Anchors.reopen([hosts[0], other][rank]))
    assert [len(anchors) for anchors in reopened] == [4, 4]
    assert contents(other) == contents(hosts[0])
