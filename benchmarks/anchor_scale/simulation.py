"""The recorded store itself, filled with synthetic projections: written, opened, read, verified and sent.

All goes through the library's own code. Each stage runs in a process of its own, so that its memory is its own.
Memory is read from ``/proc``, and cached pages are dropped by ``posix_fadvise``: Linux only.
"""

from __future__ import annotations

import os
import pickle
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
import torch.multiprocessing
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from benchmarks.anchor_scale.synthetic import FINGERPRINT, Job
from procon.anchors import AnchoredCollator, Anchors
from procon.anchors.exchange import share_files
from procon.anchors.manifest import MANIFEST, Manifest
from procon.anchors.mending import mend
from procon.anchors.shards import AnchorShards, ShardWriter, shard_files
from procon.files import load_json, save_json
from procon.sequences import split_batch

#: Sequences that are made at a time.
CHUNK = 4096

#: Sequences that are looked up, each three times: the fastest counts, as other processes only add time.
LOOKED_UP, REPEATS = 1000, 3

#: Cold look-ups between two drops of all cached pages: far fewer than a large store has pages.
COLD_RUN = 250

ROWS = 32

#: The job whose sequences are as long as those of real training.
LONG = {"tokens": 512, "sequences": 2000}

Record = dict[str, Any]


class Watch:
    """What this process took since this was made."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        self._resident = _status("VmRSS")
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def read(self) -> Record:
        """Seconds on the clock and of the processor, and resident bytes: now, and at their highest."""
        return {
            "seconds": time.perf_counter() - self._wall,
            "cpu_seconds": time.process_time() - self._cpu,
            "resident_bytes": _status("VmRSS") - self._resident,
            "peak_bytes": _status("VmHWM") - self._resident,
        }


def write(job: Job) -> Record:
    """Write what is missing: a writing that was interrupted goes on after its last whole file."""
    _claim(job)
    done = len(AnchorShards(job.folder, FINGERPRINT, job.sites))
    writer = ShardWriter(job.folder, FINGERPRINT)
    watch = Watch()
    with tqdm(total=job.sequences, initial=done, desc="write", unit="sequence", unit_scale=True) as progress:
        for first in range(done, job.sequences, CHUNK):
            numbers = np.arange(first, min(first + CHUNK, job.sequences))
            for sequence, rows in zip(job.make(numbers), job.rows(numbers), strict=True):
                writer.add(sequence.key(), rows)
            progress.update(len(numbers))
    writer.flush()
    took = watch.read()
    files = shard_files(job.folder, FINGERPRINT)
    return {
        **took,
        "sequences": job.sequences - done,
        "files": len(files),
        "bytes": sum(file.stat().st_size for file in files),
        "projection_bytes": job.sequences * job.tokens * job.sites * 4,
    }


def open_cold(job: Job) -> Record:
    """Open the store with none of it in the cache of pages."""
    _drop_cached_pages(job)
    return open_warm(job)


def open_warm(job: Job) -> Record:
    """Open the store: its memory is that of the index."""
    watch = Watch()
    anchors = Anchors(job.folder)
    took = watch.read()
    assert len(anchors) == job.sequences
    return took


def look_up(job: Job) -> Record:
    """Look single sequences up in random order, cold and warm, and batches as a collator does."""
    anchors = Anchors(job.folder)
    numbers = _drawn(job, LOOKED_UP, 0)
    sequences = list(split_batch(job.batch(numbers)))  # as a collator's batch is split
    rows = job.rows(numbers)
    found: Record = {"pickled_bytes": len(pickle.dumps(anchors))}
    best = {True: np.full(len(numbers), np.inf), False: np.full(len(numbers), np.inf)}
    order = np.random.default_rng(1)
    for cold, seconds in best.items():
        for _ in range(REPEATS):
            for turn, place in enumerate(order.permutation(len(numbers))):
                if cold and turn % COLD_RUN == 0:
                    _drop_cached_pages(job)
                start = time.perf_counter()
                looked_up = anchors.lookup(sequences[place])
                seconds[place] = min(seconds[place], time.perf_counter() - start)
                assert np.array_equal(looked_up, rows[place])
        median, high = np.percentile(seconds, [50, 99]).tolist()
        found["cold" if cold else "warm"] = {"median_seconds": median, "p99_seconds": high}
    found["batch_seconds_per_sequence"] = _annotate(job, anchors)
    return found


def load(job: Job, workers: int, samples: int = 20_000) -> Record:
    """Read random batches as training does, in the loader's workers: the second time, when pages are cached."""
    collator = _Collator(job, Anchors(job.folder))
    numbers = _drawn(job, samples, 2).tolist()
    found: Record = {}
    for _ in range(2):
        # Forked, as Linux does by default up to Python 3.13: workers share the pages of the index.
        context = "fork" if workers else None
        loader = DataLoader(numbers, ROWS, num_workers=workers, collate_fn=collator, multiprocessing_context=context)
        start = time.perf_counter()
        made = [batch["cpu_seconds"] for batch in loader]
        seconds = time.perf_counter() - start
        found = {
            "sequences_per_second": len(numbers) / seconds,
            "cpu_seconds_per_sequence": sum(made) / len(numbers),
        }
    return {"workers": workers, "sequences": len(numbers), **found}


def verify(job: Job) -> Record:
    """Verify all that is there, as a recording does that finds its folder filled; cold."""
    _drop_cached_pages(job)
    watch = Watch()
    mend(job.folder, job.manifest)
    return watch.read()


def remember(job: Job, most: int = 1_000_000) -> Record:
    """Memory of the keys that a recording keeps, to record no sequence twice."""
    count = min(job.sequences, most)
    watch, seen = Watch(), set()
    for first in range(0, count, CHUNK):
        seen.update(sequence.key() for sequence in job.make(np.arange(first, min(first + CHUNK, count))))
    took = watch.read()
    assert len(seen) == count
    return {**took, "sequences": count}


def exchange(job: Job, most: int = 2**30) -> Record:
    """Send whole files from one of two ranks to the other, on a file system of its own: over this host's loopback."""
    root = job.folder / "exchange"
    shutil.rmtree(root, ignore_errors=True)
    for rank in range(2):
        (root / str(rank)).mkdir(parents=True)
    size = 0
    for file in shard_files(job.folder, FINGERPRINT):
        if size and size + file.stat().st_size > most:
            break
        os.link(file, root / "0" / file.name)
        size += file.stat().st_size
    torch.multiprocessing.start_processes(_exchange, (str(root),), nprocs=2, start_method="fork")
    took = [load_json(root / f"{rank}.json", dict, "exchange") for rank in range(2)]
    shutil.rmtree(root)
    return {"bytes": size, **{name: max(one[name] for one in took) for name in ("seconds", "cpu_seconds")}}


def in_own_process(stage: Callable[..., Record], *arguments: Any) -> Record:
    """What a stage gives, from a process that did nothing before but import."""
    with ProcessPoolExecutor(1, get_context("fork")) as pool:
        return pool.submit(stage, *arguments).result()


def simulate(job: Job, run: Callable[..., Record] = in_own_process) -> Record:
    """All stages; those that an interrupted run of the same job has done are not done again.

    Args:
        run: calls a stage with its arguments.
    """
    long = replace(job, folder=job.folder / "long", **LONG)
    stages: Mapping[str, tuple[Callable[..., Record], *tuple[Any, ...]]] = {
        "write": (write, job),
        "open_cold": (open_cold, job),
        "open_warm": (open_warm, job),
        "look_up": (look_up, job),
        "load_0": (load, job, 0),
        "load_1": (load, job, 1),
        "load_2": (load, job, 2),
        "verify": (verify, job),
        "remember": (remember, job),
        "exchange": (exchange, job),
        "write_long": (write, long),
        "verify_long": (verify, long),
        "look_up_long": (look_up, long),
    }
    sizes = {"sequences": job.sequences, "tokens": job.tokens, "sites": job.sites, "long": LONG}
    file = job.folder / "simulation.json"
    done = load_json(file, dict, "simulation") if file.exists() else {}
    found = done if {name: done.get(name) for name in sizes} == sizes else sizes
    for name, (stage, *arguments) in stages.items():
        if name not in found:
            found[name] = run(stage, *arguments)
            save_json(found, file)
        print(f"{name}: {found[name]}", flush=True)
    return found


class _Collator:
    """Gives sequences by their numbers, with their anchors, and the processor's time that their batch took."""

    def __init__(self, job: Job, anchors: Anchors) -> None:
        self._anchored = AnchoredCollator(job.batch, anchors)

    def __call__(self, numbers: list[int]) -> dict[str, Any]:
        start = time.process_time()
        batch = self._anchored(numbers)
        return {**batch, "cpu_seconds": time.process_time() - start}


def _claim(job: Job) -> None:
    """Write the manifest, or see that the folder's own is the same."""
    job.folder.mkdir(parents=True, exist_ok=True)
    if not (job.folder / MANIFEST).exists():
        job.manifest.write(job.folder)
    if Manifest.read(job.folder) != job.manifest:
        raise SystemExit(f"{str(job.folder)!r} has other anchors: give another folder")


def _annotate(job: Job, anchors: Anchors) -> float:
    """Seconds per sequence of batches that are annotated, warm: the median of the fastest time of each."""
    seconds = []
    for numbers in np.array_split(_drawn(job, LOOKED_UP, 0), max(1, min(LOOKED_UP, job.sequences) // ROWS)):
        batch = job.batch(numbers)
        best = np.inf
        for _ in range(REPEATS + 1):
            start = time.perf_counter()
            anchors.annotate(batch)
            best = min(best, time.perf_counter() - start)
        seconds.append(best / len(numbers))
    return float(np.median(seconds))


def _exchange(rank: int, root: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{root}/rendezvous", rank=rank, world_size=2)
    dist.barrier()
    watch = Watch()
    share_files(Path(root) / str(rank), f"{FINGERPRINT}-*.safetensors")
    dist.barrier()
    save_json(watch.read(), Path(root) / f"{rank}.json")
    dist.destroy_process_group()


def _drawn(job: Job, count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(job.sequences)[:count]


def _drop_cached_pages(job: Job) -> None:
    for file in shard_files(job.folder, FINGERPRINT):
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _status(name: str) -> int:
    return _kilobytes("/proc/self/status", name) * 1024


def _kilobytes(file: str, name: str) -> int:
    return next(int(line.split()[1]) for line in Path(file).read_text().splitlines() if line.startswith(name))
