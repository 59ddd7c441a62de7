"""A small plan, and runs made up for it: what the study's hypotheses and outcomes are computed from in tests."""

import json
import lzma
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from benchmarks.study.outcomes import Outcomes
from benchmarks.study.plan import Budget, Method, Part, Size

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

TABLE = Part("table", "What is kept", "What does it keep?", (START, PLAIN, SAFE), ("arithmetic", "refuse_then_comply"))
STRENGTH = Part("strength", "By strength", "How much?", (PLAIN, *R, *RANDOM), seeds=(9,), split="validation")
CONFIRMED = Part("control", "The control", "Any direction?", (R[1], *RANDOM[2:4], THIRD_DRAW))
BUDGET = Budget((TABLE, STRENGTH, CONFIRMED), Size())


def pattern(share: float, shift: int = 0) -> list[bool]:
    """``PROMPTS`` outcomes of which ``share`` are true, beginning at prompt ``shift``."""
    return [(i - shift) % PROMPTS < round(share * PROMPTS) for i in range(PROMPTS)]


def make_run(job: str, method: Method, seed: int, refused: list[bool], split: str, task: float) -> dict:
    """A run; log-odds are 1 where refused, else -1, and a little more for each prompt."""
    malicious = [
        {"reply": f"{'no' if r else 'yes'} {i}", "refused": r, "degenerate": i == 0, "log_odds": 2.0 * r - 1 + i / 100}
        for i, r in enumerate(refused)
    ]
    benign = [{"reply": "fine", "refused": False, "degenerate": False} for _ in refused]
    tasks = [{"reply": "1", "refused": False, "degenerate": False, "correct": c} for c in pattern(task)]
    return {
        "job": job,
        "method": json.loads(json.dumps(asdict(method))),
        "seed": seed,
        "split": split,
        "replies": {"malicious": malicious, "benign": benign, "task": tasks},
    }


class Echo:
    """A second judge that reads the made-up replies; it misses the last prompt's refusals."""

    def refuses(self, replies):
        return [reply.startswith("no") and not reply.endswith(f" {PROMPTS - 1}") for reply in replies]


def writer(path: Path) -> Callable[..., dict]:
    """What makes a run, and adds it to a file of them after ``change`` of it."""

    def write(
        job: str, method: Method, seed: int, refused, split="held_out", task=0.5, change: Callable = lambda run: None
    ) -> None:
        run = make_run(
            job, method, seed, pattern(refused, seed) if isinstance(refused, float) else refused, split, task
        )
        change(run)
        with lzma.open(path, "at") as file:
            file.write(json.dumps(run) + "\n")

    return write


def load_runs(path: Path) -> Outcomes:
    return Outcomes.load(BUDGET, path, Echo())


def write_strengths(write, r: list[float], random: list[float]) -> None:
    for method, share in zip(R, r, strict=True):
        write("arithmetic", method, 9, share, split="validation")
    for number, method in enumerate(RANDOM):
        write("arithmetic", method, 9, random[number // 2], split="validation")
