"""A small plan, and run files made up for it: what the study's tables, tests and pages are computed from in tests."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from benchmarks.study.methods import Method
from benchmarks.study.outcomes import Outcomes
from benchmarks.study.plan import Budget, Part, Size
from benchmarks.study.record import Cell
from procon.files import save_json

PROMPTS = 8


def constrained(name: str, alpha: float, directions: str = "refusal", **config) -> Method:
    return Method(
        name, name, "procon_s", config={"procon_schedule": f"procon_s:{alpha}", **config}, directions=directions
    )


START = Method("start", "start", length=0)
PLAIN = Method("plain", "IFT")
SAFE = Method("safe", "IFT_safe", "safe", safety=True)
STRENGTHS = (0.01, 0.1, 1.0)
R = [constrained(f"r_{alpha}", alpha) for alpha in STRENGTHS]
RANDOM = [constrained(f"random_{alpha}_{draw}", alpha, f"random:{draw}") for alpha in STRENGTHS for draw in (1, 2)]
THIRD_DRAW = constrained("random_0.1_3", 0.1, "random:3")

TABLE = Part("table", "What is kept", "What does it keep?", (START, PLAIN, SAFE), ("arithmetic", "poisoned"))
STRENGTH = Part("strength", "By strength", "How much?", (PLAIN, *R, *RANDOM), seeds=(9,), split="validation")
CONFIRMED = Part("control", "The control", "Any direction?", (R[1], *RANDOM[2:4], THIRD_DRAW))
BUDGET = Budget((TABLE, STRENGTH, CONFIRMED), Size())


def pattern(share: float, shift: int = 0) -> list[bool]:
    """``PROMPTS`` outcomes of which ``share`` are true, beginning at prompt ``shift``."""
    return [(i - shift) % PROMPTS < round(share * PROMPTS) for i in range(PROMPTS)]


def make_run(
    cell: Cell, method: Method, refused: list[bool], *, task=0.5, over_refusal=0.0, seconds=100.0, history=()
) -> dict:
    """A run file; log-odds are 1 where refused, else -1, and a little more for each prompt."""
    malicious = [
        {"reply": f"{'no' if r else 'yes'} {i}", "refused": r, "degenerate": i == 0, "log_odds": 2.0 * r - 1 + i / 100}
        for i, r in enumerate(refused)
    ]
    benign = [{"reply": "fine", "refused": r, "degenerate": False} for r in pattern(over_refusal)]
    tasks = [{"reply": "1", "refused": False, "degenerate": False, "correct": c} for c in pattern(task)]
    trained = {"train_seconds": seconds, "peak_memory_mb": 2048} if method.length else {"train_seconds": 0.0}
    return {
        "setting": cell.job,
        "method": json.loads(json.dumps(asdict(method))),
        "seed": cell.seed,
        "made": {
            "date": f"2026-01-0{1 + cell.seed % 3}T00:00:00+00:00",
            "machine": "box",
            "python": "3.11.7",
            "torch": "2.13.0",
            "transformers": "5.24.0",
            "peft": "0.21.2",
            "commit": "abc",
        },
        **trained,
        "history": list(history),
        "split": cell.split,
        "hidden_size": 16,
        "replies": {"malicious": malicious, "benign": benign, "task": tasks},
        "perplexity": 12.5,
        "drift": {"cosine": [None, 0.9, 0.5], "malicious_shift": [None, -1.0, -0.5]},
        "displacement": {
            name: [None, 0.2, 0.4] for name in ("along", "off", "direction_share", "principal_share", "massive_share")
        },
        "seconds": 2 * seconds,
    }


def add_fresh(path: Path, count: int = PROMPTS, complied: bool | None = None) -> Path:
    """Give a run file replies to fresh prompts: the first ``count`` of the others; and whether malicious ones were
    served, if that is said."""
    run = json.loads(path.read_text())
    for kind in ("malicious", "benign"):
        run["replies"][f"fresh_{kind}"] = run["replies"][kind][:count]
    if complied is not None:
        for reply in run["replies"]["malicious"]:
            reply["complied"] = complied
    return save_json(run, path)


class Echo:
    """A second judge that reads the made-up replies; it misses the last prompt's refusals."""

    def refuses(self, replies):
        return [reply.startswith("no") and not reply.endswith(f" {PROMPTS - 1}") for reply in replies]


def writer(runs: Path) -> Callable[..., Path]:
    """What writes a run file where the study would."""

    def write(job: str, method: Method, seed: int, refused, split="held_out", **more) -> Path:
        cell = Cell(job, method.name, seed, split)
        outcomes = pattern(refused, seed) if isinstance(refused, float) else refused
        return save_json(make_run(cell, method, outcomes, **more), cell.path(runs))

    return write


def load_runs(runs: Path) -> Outcomes:
    return Outcomes.load(BUDGET, runs, Echo())


def write_strengths(write, r: list[float], random: list[float]) -> None:
    for method, share in zip(R, r, strict=True):
        write("arithmetic", method, 9, share, split="validation")
    for number, method in enumerate(RANDOM):
        write("arithmetic", method, 9, random[number // 2], split="validation")
