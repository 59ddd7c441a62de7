"""The anchors' files: what goes in comes out, damage is found, and memory and time at a hundred thousand samples."""

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
from safetensors.numpy import load_file, save_file

from procon.anchors.shards import AnchorShards, shard_files, write_shard
from procon.errors import ProConError

BLOCKS = 3
STATE = "0123456789abcdef"

#: Samples of the scale test; the figures that the bars are for belong to 100,000.
SAMPLES = int(os.environ.get("PROCON_ANCHOR_SAMPLES", "6000"))


@pytest.fixture
def sequences() -> dict[int, np.ndarray]:
    """Forty sequences of none to nineteen tokens."""
    random = np.random.default_rng(0)
    keys = random.integers(0, 2**64, 38, np.uint64).tolist()
    return {
        key: random.standard_normal((int(random.integers(20)), BLOCKS), np.float32) for key in (0, 2**64 - 1, *keys)
    }


@pytest.fixture
def folder(sequences, tmp_path):
    for part in range(4):
        write_shard(tmp_path, STATE, list(sequences.items())[part::4])
    assert len(list(tmp_path.iterdir())) == 4
    return tmp_path


@pytest.fixture
def file(tmp_path):
    """Of four sequences, of one to four tokens, whose keys are their lengths."""
    rows = np.random.default_rng(1).standard_normal((4, 4, BLOCKS), np.float32)
    write_shard(tmp_path, STATE, [(length, rows[length - 1, :length]) for length in (1, 2, 3, 4)])
    (found,) = shard_files(tmp_path, STATE)
    return found


@pytest.mark.parametrize("copied", [False, True], ids=["opened", "pickled"])
def test_what_goes_in_comes_out(sequences, folder, copied):
    shards = AnchorShards(folder, STATE, BLOCKS)
    if copied:
        shards = pickle.loads(pickle.dumps(shards))
    assert len(shards) == len(sequences)
    for key, rows in sequences.items():
        assert key in shards
        assert np.array_equal(shards.read(key), rows)
        assert key ^ 1 not in shards
        assert shards.read(key ^ 1) is None


def test_files_are_plain_safetensors(sequences, folder):
    found = {}
    for path in folder.iterdir():
        tensors = load_file(path)
        parts = np.split(tensors["projections"], tensors["index"][:, 1].cumsum()[:-1].astype(int))
        found |= dict(zip(tensors["index"][:, 0].tolist(), parts, strict=True))
    assert found.keys() == sequences.keys()
    assert all(np.array_equal(found[key], rows) for key, rows in sequences.items())


def test_rows_are_stored_in_float32_whatever_they_are(tmp_path):
    given = np.random.default_rng(0).standard_normal((BLOCKS, 5)).T  # float64, and not contiguous
    write_shard(tmp_path, STATE, [(1, given)])
    found = AnchorShards(tmp_path, STATE, BLOCKS).read(1)
    assert found.dtype == np.float32
    assert np.array_equal(found, given.astype(np.float32))


def test_empty_folder(tmp_path):
    shards = AnchorShards(tmp_path, STATE, BLOCKS)
    assert len(shards) == 0
    assert 1 not in shards


def test_what_is_written_twice_is_there_once(sequences, folder):
    names = {path.name for path in folder.iterdir()}
    write_shard(folder, STATE, list(sequences.items())[::4])
    assert {path.name for path in folder.iterdir()} == names
    write_shard(folder, STATE, list(sequences.items())[:1])
    assert len(list(folder.iterdir())) == len(names) + 1
    assert len(AnchorShards(folder, STATE, BLOCKS)) == len(sequences)


def test_files_of_other_anchors_are_left_alone_and_refused_under_our_name(sequences, folder):
    other = "f" * 16
    write_shard(folder, other, [(1, np.ones((3, BLOCKS), np.float32))])
    (folder / "notes.safetensors").write_bytes(bytes(100))
    shards = AnchorShards(folder, STATE, BLOCKS)
    assert len(shards) == len(sequences)
    assert 1 not in shards
    assert len(AnchorShards(folder, other, BLOCKS)) == 1
    (file,) = folder.glob(f"{other}-*")
    renamed = file.rename(folder / file.name.replace(other, STATE))
    with pytest.raises(ProConError, match=rf"{renamed.name}' is damaged .*or is of other anchors"):
        AnchorShards(folder, STATE, BLOCKS)


def test_another_number_of_columns_is_refused(folder):
    with pytest.raises(ProConError, match="its index is not the one that was written"):
        AnchorShards(folder, STATE, BLOCKS + 1)


def test_what_is_damaged_after_the_index_was_read_is_refused_when_it_is_read(file):
    shards = AnchorShards(file.parent, STATE, BLOCKS)
    rows = shards.read(4)
    data = file.read_bytes()
    place = data.index(rows.tobytes())
    changed = bytearray(data)
    changed[place + 5] ^= 1
    swapped = data[: place + 4] + data[place + 8 : place + 12] + data[place + 4 : place + 8] + data[place + 12 :]
    for damaged, reason in (
        (changed, "a sequence's checksum differs"),
        (swapped, "a sequence's checksum differs"),
        (data[: place + 8], "a sequence's checksum differs"),
        (None, "No such file or directory"),
    ):
        file.unlink() if damaged is None else file.write_bytes(damaged)
        with pytest.raises(ProConError, match=rf"{file.name}' is damaged .{reason}.: delete its folder, and record"):
            shards.read(4)
    file.write_bytes(data)
    assert np.array_equal(shards.read(4), rows)


def test_every_flipped_bit_is_found(file):
    """None of the header, the index or the projections gives a reader anything else than what was recorded."""
    right = {key: AnchorShards(file.parent, STATE, BLOCKS).read(key) for key in (1, 2, 3, 4)}
    data = file.read_bytes()
    for place in range(8 * len(data))[::5]:
        changed = bytearray(data)
        changed[place // 8] ^= 1 << place % 8
        file.write_bytes(changed)
        with suppress(ProConError):
            shards = AnchorShards(file.parent, STATE, BLOCKS)
            found = {}
            for key in right:
                with suppress(ProConError):
                    found[key] = shards.read(key)
            assert place // 8 >= len(data) - 10 * BLOCKS * 4  # in the index, it is found on opening
            assert len(found) == 3
            assert all(np.array_equal(rows, right[key]) for key, rows in found.items())


@pytest.mark.parametrize("length", [0, 4, 8, 200, -1, None], ids=str)
def test_a_file_that_is_cut_off_or_too_long(file, length):
    data = file.read_bytes()
    file.write_bytes(data + b"\0" if length is None else data[:length])
    with pytest.raises(ProConError, match=rf"{file.name}' is damaged"):
        AnchorShards(file.parent, STATE, BLOCKS)


@pytest.mark.parametrize(
    "changes",
    [
        {"index": np.zeros((4, 3), "<u8")},
        {"index": np.zeros(12, "<u8")},
        {"index": np.zeros((4, 3), "<i8")},
        {"index": None},
        {"projections": np.zeros((10, BLOCKS, 1), "<f4")},
        {"projections": np.zeros((10, BLOCKS + 1), "<f4")},
        {"projections": None},
    ],
)
def test_parts_that_do_not_fit(file, changes):
    tensors = {name: tensor for name, tensor in {**load_file(file), **changes}.items() if tensor is not None}
    save_file(tensors, file, {"checksum": "0" * 16})
    with pytest.raises(ProConError, match=rf"{file.name}' is damaged"):
        AnchorShards(file.parent, STATE, BLOCKS)


def test_sequences_of_equal_projections_cannot_stand_for_each_other(tmp_path):
    """The checksum is of the projections as those of this sequence, so another one's place does not pass."""
    rows = np.ones((3, BLOCKS), np.float32)
    for state in (STATE, "f" * 16):
        write_shard(tmp_path, state, [(key, rows) for key in (1, 2, 3)])
    checksums = [number for path in tmp_path.iterdir() for number in load_file(path)["index"][:, 2].tolist()]
    assert len(set(checksums)) == 6


def test_opening_takes_an_index_and_one_copy_of_it(tmp_path):
    """32 bytes per sequence stay, and about three times that is taken."""
    count = 20_000
    keys = np.random.default_rng(0).integers(0, 2**64, count, np.uint64).tolist()
    for part in range(20):
        write_shard(tmp_path, STATE, [(key, np.zeros((1, 1), np.float32)) for key in keys[part::20]])
    AnchorShards(tmp_path, STATE, 1)  # so that what is imported on the way is not counted
    tracemalloc.start()
    try:
        shards = AnchorShards(tmp_path, STATE, 1)
        stays, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(shards) == count
    # Beside the index: the names of twenty files.
    assert stays / count <= 34
    assert peak / count <= 110


SCALE = textwrap.dedent(
    """
    import itertools, json, os, pickle, sys, time
    from pathlib import Path
    import numpy as np
    import torch
    from torch.utils.data import DataLoader, get_worker_info
    from procon.anchors.shards import AnchorShards, write_shard
    from procon.anchors.store import SHARD_BYTES

    TOKENS, BLOCKS, STATE = 200, 32, "0" * 16
    task, folder, samples = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    keys = np.random.default_rng(0).integers(0, 2**64, samples, np.uint64)
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
        return int(keys[number])

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
            each = max(1, SHARD_BYTES * samples // 100_000 // rows.nbytes)
            for first in range(0, samples, each):
                numbers = range(first, min(first + each, samples))
                write_shard(folder, STATE, [(key(number), rows + np.float32(number)) for number in numbers])
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
    # A process takes up to 20 MB whatever it reads, by its versions of Python and torch and the size of pages.
    megabytes = 480 * SAMPLES / 100_000
    taken = {task: result["megabytes"] for task, result in found.items()}
    assert max(taken.values()) <= 20 + megabytes, taken
    assert found["look up"]["pickled megabytes"] <= megabytes / 50
    # The slowest reads from a disk are other processes' doing.
    assert max(found["look up"]["cold"][0], *found["look up"]["warm"]) <= 1
