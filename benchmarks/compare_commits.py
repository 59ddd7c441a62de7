"""What does a change cost? ``python -m benchmarks.compare_commits OLD [NEW]``: a training step and a look-up of each.

Each commit is checked out into a folder of its own and imported by a process of its own. The processes take turns, so
that a ratio is one of neighbours in time. On a CPU it is one of CPU times, which another process's load hardly moves.

- ``step``: forward, loss and penalty, backward and AdamW of a constrained model with LoRA, by the defaults.
- ``lookup``: the anchors of a batch found on disk and laid beside its tokens, as a loader's worker does.
- ``host``: the function calls that are Python's share of a step of ProConTrainer with its defaults on a tiny model
  (:mod:`benchmarks.host`): a count, the same in each run.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from statistics import median

from benchmarks.harness.checkouts import environment
from benchmarks.harness.interleaved import Samples, interleave

ALPHA = 0.2
ROWS, LENGTH = 8, 96


def workload(folder: str, shape: str = "SmolLM2-135M") -> dict[str, Callable[[], object]]:
    """What is timed, by name, with whichever version of the library is imported."""
    import torch

    from benchmarks.harness.shapes import SHAPES, make_batch, make_model, make_optimizer
    from procon import Anchors, Directions, ProjectionConstraint

    torch.set_num_threads(1)
    model = make_model(shape, torch.float32, "lora")
    # As every commit takes them; vectors without prompts have no unit.
    vectors = torch.randn(SHAPES[shape]["num_hidden_layers"], SHAPES[shape]["hidden_size"])
    directions = Directions.from_vectors(model, vectors, name="random")
    batch = make_batch(shape, ROWS, LENGTH, packed=False)
    optimizer = make_optimizer(model.parameters())
    anchors = Anchors.record(model, [batch], directions, folder, progress=False)
    on_cpu = {name: value.cpu() for name, value in batch.items()}
    constraint = ProjectionConstraint(directions).attach(model)
    target = anchors.annotate(dict(on_cpu))

    def step() -> None:
        optimizer.zero_grad()
        constraint.set_target(*(target[name].to(model.device) for name in ("anchors", "constraint_mask")))
        (model(**batch).loss + ALPHA * constraint.penalty()).backward()
        constraint.release()
        optimizer.step()

    return {"step": step, "lookup": lambda: anchors.annotate(dict(on_cpu))}


def serve() -> None:
    """Run what each line of standard input names, so many times, and answer with the seconds per call."""
    # What libraries print while they load is no answer.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    import torch

    from benchmarks import host
    from benchmarks.harness.timers import wall_time

    clock = wall_time if torch.cuda.is_available() else cpu_time
    with tempfile.TemporaryDirectory() as folder:
        calls = workload(folder)
        for line in sys.stdin:
            name, count = line.split()
            found = host.share(host.calls, folder) if name == "host" else clock(calls[name], int(count))
            print(found, file=answers, flush=True)


def cpu_time(call: Callable[[], object], calls: int) -> float:
    """Seconds per call that this process had a core."""
    start = time.process_time()
    for _ in range(calls):
        call()
    return (time.process_time() - start) / calls


def start(commit: str, folder: Path, stack: ExitStack) -> subprocess.Popen[str]:
    """A process that serves the library as of ``commit``."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "benchmarks.compare_commits", "--serve"],
        env=environment(commit, folder, stack),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    stack.callback(process.terminate)
    return process


def compare(old: str, new: str, rounds: int) -> dict[str, Samples]:
    """Seconds of each workload under both commits, in turns; of ``host``, calls."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        processes = {}
        for name, commit in (("old", old), ("new", new)):
            (Path(folder) / name).mkdir()
            processes[name] = start(commit, Path(folder) / name, stack)

        def timer(call: Callable[[], object], count: int) -> float:
            process, workload = call()
            process.stdin.write(f"{workload} {count}\n")
            process.stdin.flush()
            return float(process.stdout.readline())

        def timed(names: Iterable[str], seconds: float = 0.0) -> Samples:
            contenders = {
                f"{commit} {name}": lambda process=process, name=name: (process, name)
                for commit, process in processes.items()
                for name in names
            }
            return interleave(contenders, timer, rounds=rounds, sample_seconds=seconds)

        found = {"step": timed(["step"]), "lookup": timed(["lookup"], 0.5)}
        counts = {name: [timer(lambda process=process: (process, "host"), 1)] for name, process in processes.items()}
        return {**found, "host": Samples({f"{name} host": count for name, count in counts.items()})}


def main(argv: list[str] | None = None) -> None:
    """Print the ratios, medians with their 95% intervals."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare_commits", description=__doc__)
    parser.add_argument("old", nargs="?", help="The commit to compare with.")
    parser.add_argument("new", nargs="?", default="HEAD")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args(argv)
    if chosen.serve:
        serve()
        return
    if chosen.old is None:
        parser.error("give the commit to compare with")
    for name, samples in compare(chosen.old, chosen.new, chosen.rounds).items():
        ratio = samples.ratio(f"new {name}", f"old {name}")
        old, new = (median(samples.seconds[f"{which} {name}"]) for which in ("old", "new"))
        if name == "host":
            print(f"{name}: {ratio.median:.3f}; calls a step: old {old:.0f}, new {new:.0f}")
            continue
        print(
            f"{name}: {ratio.median:.3f} ({ratio.low:.3f} to {ratio.high:.3f}), {chosen.rounds} pairs; "
            f"old {1e3 * old:.3f} ms, new {1e3 * new:.3f} ms"
        )


if __name__ == "__main__":
    main()
