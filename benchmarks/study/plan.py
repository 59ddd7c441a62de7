"""What is run: the parts of the study, each with its question, and how much of them a budget runs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.study.jobs import Job, find_job
from benchmarks.study.methods import Method
from benchmarks.study.record import Cell
from procon.chat import Split
from procon.demo import Problem


@dataclass(frozen=True)
class Size:
    """How much of everything.

    Attributes:
        train, test: task problems trained on and measured.
        epochs: over the training data; a method's ``length`` multiplies it.
        prompts: contrast prompts measured, of each split and side.
        extraction: contrast pairs that directions come from; ``pairs`` of them are the probes of drift.
        poisoned, safety: samples mixed in if a job or method has them.
        fresh: prompts of another make measured as well, of each side.
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

    def __post_init__(self):
        known: dict[str, Method] = {}
        for part in self.parts:
            for method in part.methods:
                if known.setdefault(method.name, method) != method:
                    raise ValueError(f"two methods are called {method.name!r}")

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

    def method(self, cell: Cell) -> Method:
        """The method of a cell."""
        return next(method for part in self.parts for method in part.methods if method.name == cell.method)

    def job(self, cell: Cell) -> Job:
        """The job of a cell."""
        return find_job(cell.job)
