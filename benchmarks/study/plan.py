"""What is run: methods, and the parts of a budget, each with its question; read from ``plans/BUDGET.yaml``.

A method's run files carry its settings. One whose code is gone is ``retired``: it is reported, and run again at the
commit that its runs name. ``plain_x4`` is the method ``plain``, trained for four times the steps.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from benchmarks.study.jobs import Job, find_job
from procon.chat import Split
from procon.demo import Problem
from procon.errors import ProConError

PLANS, RUNS = Path(__file__).parent / "plans", Path(__file__).parent / "runs"


@dataclass(frozen=True)
class Method:
    """One way of fine-tuning.

    Attributes:
        name: in run files, such as ``procon_wu``.
        label: in tables.
        defence: its name in :data:`benchmarks.study.defences.DEFENCES`.
        settings: of that defence.
        config: of ProConConfig, in addition to the recipe that all methods share. ``procon_probes`` may be
            ``builtin:8``, the first eight of the built-in ones.
        directions: ``refusal``, or a control: ``random:SEED``, ``within:SEED``, ``shuffled:SEED``; ``k:K`` for several.
        safety: whether safety samples are mixed in; ``styled``: in the form of the task.
        samples: how many of them, if not the budget's number.
        own: whether samples, mixed in or aligned on, are the starting model's own replies in place of safety samples.
        length: of training, in multiples of the budget's; 0 leaves the start as it is.
        adapter: whether a LoRA adapter is trained, or all weights.
        retired: whether its code is gone.
    """

    name: str
    label: str
    defence: str = "plain"
    settings: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    directions: str = "refusal"
    safety: bool = False
    styled: bool = False
    samples: int | None = None
    own: bool = False
    length: float = 1.0
    adapter: bool = True
    retired: bool = False


@dataclass(frozen=True)
class Size:
    """How much of everything.

    Attributes:
        train, test: task problems trained on and measured.
        epochs: over the training data; a method's ``length`` multiplies it.
        prompts: contrast prompts measured, of each split and side.
        extraction: contrast pairs that directions come from; ``pairs`` of them are the probes of drift.
        poisoned, safety: samples mixed in if a job or method has them.
        fresh: prompts of the second set measured as well, of each side.
        chosen_on: jobs whose first test problems served for choices; held-out runs have the next ones.
    """

    train: int = 320
    test: int = 128
    epochs: float = 1.0
    prompts: int = 64
    extraction: int = 192
    pairs: int = 64
    poisoned: int = 10
    safety: int = 16
    fresh: int = 0
    chosen_on: tuple[str, ...] = ()

    def problems(self, job: Job, split: Split) -> list[Problem]:
        """The task problems of ``job`` that are measured."""
        seen = split == "held_out" and any(find_job(name).problems is job.problems for name in self.chosen_on)
        return job.test(train=self.train + seen * self.test, test=self.test)

    def problems_hash(self, job: Job, split: Split) -> str:
        """A short hash of those problems, which tells the runs of one size from those of another."""
        return hashlib.sha256(repr(self.problems(job, split)).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Part:
    """Methods that are compared with each other, to answer one question.

    Choices are made on the validation prompts, with a seed of their own. Results are measured on the held-out ones.

    Attributes:
        jobs: names, as :func:`benchmarks.study.jobs.find_job` takes them.
    """

    name: str
    title: str
    question: str
    methods: tuple[Method, ...]
    jobs: tuple[str, ...] = ("arithmetic",)
    seeds: tuple[int, ...] = (0, 1, 2)
    split: Split = "held_out"


class Cell(NamedTuple):
    """A run's place in the study; ``split`` says on which contrast prompts it is measured."""

    job: str
    method: str
    seed: int
    split: Split = "held_out"

    def __str__(self) -> str:
        return f"{self.job}/{self.method}/seed-{self.seed}"


@dataclass(frozen=True)
class Budget:
    """Parts at a size.

    Attributes:
        model: that the runs start from, by its name in the study, if the command gives none.
        loading: of that model; arguments of ``load_model``.
    """

    parts: tuple[Part, ...]
    size: Size
    model: str = "smollm2"
    loading: Mapping[str, Any] = field(default_factory=dict)

    def cells(self) -> list[Cell]:
        """Every run once: part by part, and within it seed by seed, so that an unfinished part has whole seeds."""
        cells = (
            Cell(job, method.name, seed, part.split)
            for part in self.parts
            for seed in part.seeds
            for job in part.jobs
            for method in part.methods
            # Nothing is trained, so there is one run whatever the seed.
            if method.length or seed == part.seeds[0]
        )
        return list(dict.fromkeys(cells))

    def method(self, name: str) -> Method:
        """The method of that name."""
        return next(method for part in self.parts for method in part.methods if method.name == name)


def load_budget(name: str) -> Budget:
    """The budget of that name: ``smoke`` for continuous integration, and those of the results.

    Raises:
        ProConError: if there is none.
    """
    known = sorted(file.stem for file in PLANS.glob("*.yaml"))
    if name not in known:
        raise ProConError(f"budget is {name!r}: choose one of {', '.join(known)}")
    plan = yaml.safe_load((PLANS / f"{name}.yaml").read_text(encoding="utf-8"))
    methods = {name: Method(name, **given) for name, given in plan["methods"].items()}
    return Budget(
        tuple(
            Part(**{**_frozen(part), "methods": tuple(_find(name, methods) for name in part["methods"])})
            for part in plan["parts"]
        ),
        Size(**_frozen(plan.get("size", {}))),
        plan.get("model", "smollm2"),
        plan.get("loading", {}),
    )


def _frozen(given: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}


def _find(name: str, methods: Mapping[str, Method]) -> Method:
    """A method by its name, which may say that it is trained for longer."""
    base, long, length = name.rpartition("_x")
    if name in methods or not (long and re.fullmatch(r"[\d.]+", length)):
        return methods[name]
    method = methods[base]
    return replace(method, name=name, label=f"{method.label}, {length}x", length=float(length))
