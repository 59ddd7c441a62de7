"""The anchors' files: what goes in comes out, whole files only, and memory and time at a hundred thousand samples."""

import json
import os
import pickle
import textwrap
import tracemalloc
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from forked import run_python
from safetensors import safe_open

from procon.anchors.shards import AnchorShards, ShardWriter
from procon.errors import ProConError
from procon.files import whole_file

BLOCKS = 3
STATE = "0123456789abcdef"

#: Samples of the scale test; the figures that the bars are for belong to 100,000.
SAMPLES = int(os.environ.get("PROCON_ANCHOR_SAMPLES", "3000"))


@pytest.fixture
def sequences():
    """Forty sequences of none to nineteen tokens; some have the same tokens under other labels."""
    random = np.random.default_rng(0)
    lengths = random.integers(0, 20, 40)
    return {
        (
            int(random.integers(2**63)) * 2 + 1 if number % 4 else 5,
            int(random.integers(2**63)) * 2,
        ): random.standard_normal((length, BLOCKS), dtype=np.float32)
        for number, length in enumerate(lengths)
    }


@pytest.fixture
def folder(sequences, tmp_path, monkeypatch):
    monkeypatch.setattr("procon.anchors.shards.SHARD_BYTES", 1000)
    writer = ShardWriter(tmp_path, STATE)
    for key, rows in sequences.items():
        writer.add(key, rows)
    writer.flush()
    writer.flush()
    assert len(list(tmp_path.iterdir())) > 3
    return tmp_path


@pytest.mark.parametrize("copied", [False, True], ids=["opened", "pickled"])
def test_what_goes_in_comes_out(sequences, folder, copied):
    shards = AnchorShards(folder, STATE, BLOCKS)
    if copied:
        shards = pickle.loads(pickle.dumps(shards))
    assert len(shards) == len(sequences)
    for key, rows in sequences.items():
        assert key in shards
        assert np.array_equal(shards.read(key), rows)
    token_hash, label_hash = next(iter(sequences))
    assert shards.read((token_hash, label_hash + 1)) is None
    assert (token_hash, label_hash + 1) not in shards
    assert shards.has_tokens((token_hash, label_hash + 1))
    assert not shards.has_tokens((2, label_hash))


def test_files_are_plain_safetensors(sequences, folder):
    found = {}
    for path in folder.iterdir():
        with safe_open(path, "numpy") as file:
            keys, offsets, rows = (file.get_tensor(name) for name in ("keys", "offsets", "projections"))
        assert rows.dtype == np.float32
        assert rows.nbytes < 1000 + 20 * BLOCKS * 4
        found |= {tuple(key): part for key, part in zip(keys.tolist(), np.split(rows, offsets[1:-1]), strict=True)}
    assert found.keys() == sequences.keys()
    assert all(np.array_equal(found[key], rows) for key, rows in sequences.items())


def test_empty_folder(tmp_path):
    shards = AnchorShards(tmp_path, STATE, BLOCKS)
    assert len(shards) == 0
    assert (1, 2) not in shards


def test_what_is_written_twice_is_there_once(sequences, folder):
    names = {path.name for path in folder.iterdir()}
    again = ShardWriter(folder, STATE)
    for key, rows in sequences.items():
        again.add(key, rows)
    again.flush()
    assert {path.name for path in folder.iterdir()} == names
    writer = ShardWriter(folder, STATE)
    writer.add(*next(iter(sequences.items())))
    writer.flush()
    assert len(list(folder.iterdir())) == len(names) + 1
    assert len(AnchorShards(folder, STATE, BLOCKS)) == len(sequences)


def test_a_file_that_was_deleted_is_written_again_and_no_other_is_touched(sequences, folder):
    lost, *others = sorted(folder.iterdir())
    lost.unlink()
    kept = {path: path.stat().st_mtime_ns for path in others}
    known = AnchorShards(folder, STATE, BLOCKS)
    missing = {key: rows for key, rows in sequences.items() if key not in known}
    assert missing
    writer = ShardWriter(folder, STATE)
    for key, rows in missing.items():
        writer.add(key, rows)
    writer.flush()
    assert {path: path.stat().st_mtime_ns for path in others} == kept
    assert len(AnchorShards(folder, STATE, BLOCKS)) == len(sequences)


def test_an_interrupted_file_is_not_there(tmp_path):
    with suppress(KeyboardInterrupt), whole_file(tmp_path / "a.safetensors") as partial:
        partial.write_bytes(b"half")
        raise KeyboardInterrupt
    assert len(AnchorShards(tmp_path, STATE, BLOCKS)) == 0
    with whole_file(tmp_path / "a.safetensors") as partial:
        partial.write_bytes(b"whole")
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_files_of_other_anchors_are_left_alone(sequences, folder):
    other = "f" * 16
    writer = ShardWriter(folder, other)
    writer.add((1, 2), np.ones((3, BLOCKS), np.float32))
    writer.flush()
    (folder / "notes.safetensors").write_bytes(b"\x00" * 100)
    shards = AnchorShards(folder, STATE, BLOCKS)
    assert len(shards) == len(sequences)
    assert (1, 2) not in shards
    assert len(AnchorShards(folder, other, BLOCKS)) == 1


def test_a_file_of_other_anchors_under_our_name_is_refused(folder):
    """Even if someone writes our fingerprint into it: each checksum was made under the other one."""
    other = "f" * 16
    writer = ShardWriter(folder, other)
    writer.add((1, 2), np.ones((3, BLOCKS), np.float32))
    writer.flush()
    (file,) = folder.glob(f"{other}-*")
    renamed = file.rename(folder / file.name.replace(other, STATE))
    with pytest.raises(ProConError, match=rf"{renamed.name}.*damaged .its fingerprint is '{other}', so it is of other"):
        AnchorShards(folder, STATE, BLOCKS)
    renamed.write_bytes(renamed.read_bytes().replace(other.encode(), STATE.encode()))
    with pytest.raises(ProConError, match="the checksum of its index differs"):
        AnchorShards(folder, STATE, BLOCKS)


def test_another_number_of_columns_is_refused(folder):
    with pytest.raises(ProConError, match="its parts do not fit together"):
        AnchorShards(folder, STATE, BLOCKS + 1)


def test_what_is_damaged_after_the_index_was_read_is_refused_when_it_is_read(sequences, folder):
    shards = AnchorShards(folder, STATE, BLOCKS)
    key, rows = max(sequences.items(), key=lambda pair: len(pair[1]))
    (file,) = [path for path in folder.iterdir() if rows.tobytes() in path.read_bytes()]
    data = file.read_bytes()
    place = data.index(rows.tobytes())
    changed = bytearray(data)
    changed[place + 5] ^= 1
    swapped = data[: place + 4] + data[place + 8 : place + 12] + data[place + 4 : place + 8] + data[place + 12 :]
    for damaged, reason in (
        (changed, "a sequence's checksum differs"),
        (swapped, "a sequence's checksum differs"),
        (data[: place + 8], "it is cut off"),
        (None, "No such file or directory"),
    ):
        file.unlink() if damaged is None else file.write_bytes(damaged)
        with pytest.raises(ProConError, match=rf"{file.name}' is damaged .{reason}.: record again"):
            shards.read(key)
    file.write_bytes(data)
    assert np.array_equal(shards.read(key), rows)


def test_sequences_of_equal_projections_cannot_stand_for_each_other(tmp_path):
    """The checksum is of the projections as those of this sequence, so another one's place does not pass."""
    rows = np.ones((3, BLOCKS), np.float32)
    writer = ShardWriter(tmp_path, STATE)
    for key in ((1, 2), (2, 2), (1, 1)):
        writer.add(key, rows)
    writer.flush()
    (file,) = tmp_path.iterdir()
    with safe_open(file, "numpy") as opened:
        assert len(set(opened.get_tensor("checksums").tolist())) == 3
        assert opened.metadata()["fingerprint"] == STATE


def test_opening_takes_an_index_and_one_copy_of_it(tmp_path):
    """48 bytes per sequence stay, and at most twice that is taken: at ten million sequences a copy is 400 MB."""
    count = 20_000
    writer = ShardWriter(tmp_path, STATE)
    for number, key in enumerate(np.random.default_rng(0).integers(0, 2**64, (count, 2), np.uint64).tolist()):
        writer.add(tuple(key), np.zeros((1, 1), np.float32))
        if number % 1000 == 999:
            writer.flush()
    AnchorShards(tmp_path, STATE, 1)  # so that what is imported on the way is not counted
    tracemalloc.start()
    try:
        shards = AnchorShards(tmp_path, STATE, 1)
        stays, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(shards) == count
    # Beside the index: the names of twenty files.
    assert stays / count <= 50
    assert peak / count <= 100


SCALE = textwrap.dedent(
    """
    import itertools, json, os, pickle, sys, time
    from pathlib import Path
    import numpy as np
    import torch
    from torch.utils.data import DataLoader, get_worker_info
    from procon.anchors import shards as module
    from procon.anchors.shards import AnchorShards, ShardWriter

    TOKENS, BLOCKS, STATE = 200, 32, "0" * 16
    task, folder, samples = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    keys = np.random.default_rng(0).integers(0, 2**64, (samples, 2), np.uint64)
    rows = np.random.default_rng(1).standard_normal((TOKENS, BLOCKS), dtype=np.float32)

    class Peak:
        '''Resident megabytes beyond those at the start, at their highest.'''
        def __init__(self):
            Path("/proc/self/clear_refs").write_text("5")
            self.start = self._read("VmHWM")
        def _read(self, name):
            lines = Path("/proc/self/status").read_text().splitlines()
            return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024
        def __call__(self):
            return self._read("VmHWM") - self.start

    def key(number):
        return tuple(keys[number].tolist())

    def drop_cached_pages():
        for file in folder.iterdir():
            descriptor = os.open(file, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)

    def lookups(shards, count, cold):
        '''Median and 99th percentile over samples, in ms: the best of three, as other processes only add time.'''
        best = np.full(count, np.inf)
        random = np.random.default_rng(2)
        chosen = random.permutation(samples)[:count]
        for _ in range(3):
            for place in random.permutation(count):
                wanted = key(chosen[place])
                if cold:
                    drop_cached_pages()
                start = time.perf_counter()
                found = shards.read(wanted)
                best[place] = min(best[place], 1e3 * (time.perf_counter() - start))
                assert found.shape == rows.shape and found[7, 3] == rows[7, 3] + np.float32(chosen[place])
        return np.percentile(best, [50, 99]).tolist()

    class Epoch(torch.utils.data.Dataset):
        '''Reads all samples; each gives the peak of the worker that reads it.'''
        def __init__(self, shards):
            self.shards, self.order, self.peak = shards, np.random.default_rng(3).permutation(samples), None
        def __len__(self):
            return samples
        def __getitem__(self, index):
            self.peak = self.peak or Peak()
            assert self.shards.read(key(self.order[index])) is not None
            return self.peak() if index % 100 == 0 else 0.0

    if __name__ == "__main__":
        peak, start = Peak(), time.perf_counter()
        if task == "record":
            # Smaller files for fewer samples, so that what the writer gathers shrinks alike.
            module.SHARD_BYTES = module.SHARD_BYTES * samples // 100_000
            writer = ShardWriter(folder, STATE)
            for number in range(samples):
                writer.add(key(number), rows + np.float32(number))
            writer.flush()
            found = {"seconds": time.perf_counter() - start, "megabytes": peak()}
            os.sync()
        elif task == "look up":
            shards = AnchorShards(folder, STATE, BLOCKS)
            found = {"open seconds": time.perf_counter() - start, "sequences": len(shards)}
            found["cold"], found["warm"] = lookups(shards, 300, True), lookups(shards, 3000, False)
            found["pickled megabytes"] = len(pickle.dumps(shards)) / 2**20
            found["megabytes"] = peak()
        else:
            samples_read = Epoch(AnchorShards(folder, STATE, BLOCKS))
            epoch = DataLoader(samples_read, 100, num_workers=2, multiprocessing_context=task)
            found = {"megabytes": max(batch.max().item() for batch in epoch)}
        Path(sys.argv[4]).write_text(json.dumps(found))
    """
)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks of resident memory are read from /proc")
def test_memory_and_time_of_many_samples(tmp_path, capsys):
    """100,000 samples of 200 tokens by 32 blocks take at most 500 MB, and a lookup 1 ms; fewer samples, less memory.

    ``PROCON_ANCHOR_SAMPLES=100000`` runs it at full size, on 2.6 GB of disk, and with workers that are spawned as well.
    """
    script, folder = tmp_path / "scale.py", tmp_path / "anchors"
    script.write_text(SCALE)
    folder.mkdir()
    found = {}
    for task in ("record", "look up", "fork", *(["spawn"] if SAMPLES == 100_000 else [])):
        run_python(script, task, folder, str(SAMPLES), tmp_path / "found.json")
        found[task] = json.loads((tmp_path / "found.json").read_text())
    with capsys.disabled():
        print(f"\n{SAMPLES} samples: {json.dumps(found, indent=2)}")
    assert found["look up"]["sequences"] == SAMPLES
    megabytes = 500 * SAMPLES / 100_000
    assert all(result["megabytes"] <= megabytes for result in found.values())
    assert found["look up"]["pickled megabytes"] <= megabytes / 50
    # The slowest reads from a disk are other processes' doing.
    assert max(found["look up"]["cold"][0], *found["look up"]["warm"]) <= 1
