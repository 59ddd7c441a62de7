"""What the method's loss is a sum of, and what a term may know of the training that it is part of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from procon.anchors import LiveAnchors
from procon.directions import Directions
from procon.ranks import are_ranks, on_main
from procon.settings import ChatSettings

#: Makes a loader that runs through the training set once.
Batches = Callable[[], Iterable[Mapping[str, Tensor]]]

#: A data collator: samples in, a batch out.
Collator = Callable[[list[Any]], dict[str, Any]]


class Run:
    """The training that the method is part of: of a plain loop, on one rank or more, unless a trainer says otherwise.

    Args:
        model: the causal LM that trains, bare or within PEFT.
        tokenizer: with a chat template, for directions and probes.
        chat: how the model is asked.
        folder: where recorded anchors are kept.
        progress: whether bars show how far preparing is.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any = None,
        *,
        chat: ChatSettings | None = None,
        folder: str | Path = "procon-output",
        progress: bool = True,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.chat = chat or ChatSettings()
        self.folder = Path(folder)
        self.progress = progress

    @property
    def is_loaded_in_parts(self) -> bool:
        """Whether every rank has loaded a part of the model alone, so that all must run it together from the first."""
        return False

    @property
    def groups(self) -> int:
        """How many ranks, or groups of them, have a batch of their own."""
        return dist.get_world_size() if are_ranks() else 1

    @property
    def group(self) -> int:
        """Which of these this one is, from 0."""
        return dist.get_rank() if are_ranks() else 0

    @property
    def device(self) -> torch.device:
        """Where batches go."""
        return next(self.model.parameters()).device

    def autocast(self) -> AbstractContextManager[Any]:
        """What training's forwards run in."""
        return nullcontext()

    def total(self, tensor: Tensor) -> Tensor:
        """The sum of a scalar over the ranks."""
        if are_ranks():  # not by Accelerate, which may have been set up for one process before the ranks were
            dist.all_reduce(tensor := tensor.clone())
        return tensor

    def once(self, call: Callable[[], Any], *, all_call: bool = False) -> Any:
        """What ``call`` gives on the main rank, on every rank; ``all_call`` if sharded weights need all of them."""
        return on_main(call, all_call=all_call)

    @property
    def reference(self) -> nn.Module | None:
        """The starting model as a module of its own, if the trainer has one anyway."""
        return None

    def project(self, live: LiveAnchors, batch: dict[str, Any]) -> Tensor:
        """Live anchors of a batch; a trainer whose reference model runs anyway takes them from that forward."""
        return live(batch)


@dataclass
class Step:
    """One optimiser step.

    Attributes:
        number: from 0.
        alpha: strength of the constraint in it.
        tokens: constrained tokens of all its micro-batches and ranks; None if they are not known beforehand.
        parts: if ``tokens`` is None, how many means over a micro-batch make up the step's, over all ranks.
        done: names of terms that have their whole share of it already.
    """

    number: int = 0
    alpha: float = 0.0
    tokens: Tensor | None = None
    parts: int | Tensor = 1
    done: set[str] = field(default_factory=set)


class Term:
    """A part of the method: what it adds to the loss, and what it needs for that. Most terms have a few of these verbs.

    A new term is a class like this one in a file of its own, and a line in :func:`procon.method.procon.make_terms`.

    Attributes:
        name: by which records and errors call it.
        needs_directions: whether it works along refusal directions, which are then extracted if none are given.
        runs_the_model: whether its share comes of a forward of its own; the others then stand aside.
        batch_keys: what its collator adds to a batch, tensors ``[B, T, ...]`` that stay fp32.
    """

    name: ClassVar[str]
    needs_directions: ClassVar[bool] = False
    runs_the_model: ClassVar[bool] = False
    batch_keys: ClassVar[tuple[str, ...]] = ()

    def use(self, directions: Directions) -> None:
        """Work along ``directions``, once they are found; asked of a term that needs them."""

    def attach(self, run: Run) -> None:
        """Before training: put hooks on ``run.model``."""

    def detach(self) -> None:
        """After training: the model is as it was."""

    def collator(self, collate: Collator, run: Run) -> Collator:
        """What makes batches in the loader's workers, around the training's own ``collate``."""
        return collate

    def prepare(self, run: Run, batches: Batches) -> None:
        """Record what the starting model is, unless :meth:`restore` has it: the model is where it will train.

        Args:
            batches: makes a loader of the training set, each rank's share once, for a term that records it.
        """

    @property
    def ready(self) -> bool:
        """Whether all is recorded or restored that it needs."""
        return True

    def begin(self, batch: dict[str, Any], run: Run) -> None:
        """Before a training forward that it has a share of: take out of the batch what its collator has added."""
        self.discard(batch)

    def discard(self, batch: dict[str, Any]) -> None:
        """Before any other forward: the same, for nothing."""
        for name in self.batch_keys:
            batch.pop(name, None)

    def acts(self, step: Step) -> bool:
        """Whether this optimiser step has a share of it."""
        return True

    def idle(self) -> str:
        """What to change if none of a training's steps would have a share of it."""
        return "train longer"

    def check_start(self, run: Run) -> None:
        """In the first step of a training, after its forward: warn if the model is not what was recorded of it."""

    def share(self, step: Step, run: Run) -> Tensor | None:
        """After the forward: this micro-batch's share of the term, before alpha; shares of a step add up to its mean.

        None if the term has no share of this micro-batch.
        """
        return None

    def aside(self) -> None:
        """Another term is about to run the model: that forward is none of this term's."""

    def release(self) -> None:
        """After backward, or when a step failed: drop what a forward has left."""

    def before_optimizer(self, step: Step, run: Run) -> None:
        """Change the step's gradient, once it is complete and before it is clipped."""

    def after_optimizer(self, step: Step, run: Run) -> None:
        """Change the weights after the optimiser's step."""

    def pause(self, paused: bool) -> None:
        """Whether alpha is 0 now, so that forwards run at plain speed."""

    def save(self, folder: Path) -> None:
        """Write what a checkpoint and the finished model have of it."""

    def state(self) -> dict[str, Any]:
        """What else a resumed run needs, as JSON."""
        return {}

    def restore(self, state: Mapping[str, Any], folder: Path, run: Run) -> None:
        """Take :meth:`state` and the files of :meth:`save` from the checkpoint in ``folder``."""

    def describe(self) -> dict[str, Any]:
        """Settings that a resumed run must share, as JSON."""
        return {}

    def summary(self) -> str:
        """What it keeps, in a line for people, once it is prepared."""
        return type(self).__name__
