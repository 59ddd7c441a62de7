"""The paper's term: the training tokens are kept near their anchors along the refusal directions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from procon.anchors import AnchoredCollator, Anchors, LiveAnchors, fingerprint
from procon.anchors.live import ADAPTERS_OFF
from procon.constraint import ProjectionConstraint
from procon.directions import Directions
from procon.errors import ProConError
from procon.method.term import Batches, Collator, Run, Step, Term
from procon.settings import Fuse, ProConSettings

NO_ANCHORS = "the batch has no anchors: leave the collator to ProCon, and batches as it makes them"

#: What the anchored collator adds to a batch; never handed to the model.
TARGET = ("anchors", "constraint_mask")


class TokenTerm(Term):
    """Mean over constrained tokens and blocks of ``phi(<r_l, x_l[t]> - z0_l[t])`` (paper section III-C1), by the fused
    op at each block.

    Attributes:
        constraint: on the model while attached.
        anchors: recorded ones, once there are any.
        live: what makes anchors of a batch, if they are not recorded.
        fuse: ``"never"`` leaves the blocks' norms alone, ``"auto"`` has them do the work.
        fusion: in how many blocks they do, once it is attached, and why not in others.
    """

    name: ClassVar[str] = "tokens"
    needs_directions: ClassVar[bool] = True
    batch_keys: ClassVar[tuple[str, ...]] = TARGET

    def __init__(self, settings: ProConSettings, *, fuse: Fuse = "auto") -> None:
        self._settings = settings
        self._is_live = settings.anchors == "live"
        self.fuse: Fuse = fuse
        self.fusion = ""
        self.constraint: ProjectionConstraint
        self.anchors: Anchors | None = None
        self.live: LiveAnchors | None = None
        self._adapters_off: bool | None = None
        self._directions: Directions
        self._collator: AnchoredCollator | None = None

    def use(self, directions: Directions) -> None:
        """Work along ``directions``; ProConError if they have none at the blocks."""
        self._directions = directions
        settings = self._settings
        self.constraint = ProjectionConstraint(directions, blocks=settings.blocks, penalty=settings.penalty)

    def attach(self, run: Run) -> None:
        self.fusion = self.constraint.attach(run.model, fuse=self.fuse).fusion

    def detach(self) -> None:
        self.constraint.detach()

    def collator(self, collate: Collator, run: Run) -> Collator:
        anchors = self._settings.scope if self._is_live else self.anchors
        self._collator = AnchoredCollator(collate, anchors, tokenizer=run.tokenizer)
        return self._collator

    def prepare(self, run: Run, batches: Batches) -> None:
        if self._is_live:
            if self.live is None:
                self.live = self._live_anchors(run)
            return
        if self._collator is None:
            raise ProConError(NO_ANCHORS)
        if self.anchors is None:
            blocks, scope = self.constraint.blocks, self._settings.scope
            with run.autocast():
                state = fingerprint(run.model, self._directions, blocks, scope)
                self.anchors = Anchors.record(
                    run.model,
                    batches(),
                    self._directions,
                    self._folder(run) / state,
                    blocks=blocks,
                    scope=scope,
                    progress=run.progress,
                    state=state,
                )
        self._collator.anchors = self.anchors

    @property
    def ready(self) -> bool:
        return self.anchors is not None or self.live is not None

    def begin(self, batch: dict[str, Any], run: Run) -> None:
        anchors, mask = batch.pop(TARGET[0], None), batch.pop(TARGET[1], None)
        if anchors is None and self.live is not None:
            anchors = run.project(self.live, batch)
        if anchors is None or mask is None:
            raise ProConError(NO_ANCHORS)
        self.constraint.set_target(anchors, mask)

    def share(self, step: Step, run: Run) -> Tensor:
        if step.tokens is None:
            return self.constraint.penalty() / step.parts
        return self.constraint.penalty(step.tokens)

    def aside(self) -> None:
        self.constraint.rest()

    def release(self) -> None:
        self.constraint.release()

    def pause(self, paused: bool) -> None:
        self.constraint.enabled = not paused

    def state(self) -> dict[str, Any]:
        return {
            "anchors": self.anchors.fingerprint if self.anchors else None,
            "starting_model": self.live.start if self.live else None,
            "fusion": self.fusion,
        }

    def restore(self, state: Mapping[str, Any], folder: Path, run: Run) -> None:
        """The anchors as they were when the run began: the model is in that state no longer, once it is loaded."""
        if not self._is_live:
            self.anchors = Anchors.reopen(self._folder(run) / state["anchors"], state["anchors"])
            return
        start = state["starting_model"]
        if start == ADAPTERS_OFF:
            # The adapters of a resumed run are trained already by the time that it is loaded.
            self._adapters_off = True
            return
        # Of the model that was given to this run, which must be the one that the interrupted run was given.
        self.live = self._live_anchors(run)
        if self.live.start != start:
            raise ProConError(
                f"checkpoint {str(folder)!r} began from another starting model than the one given: load the model, and "
                "the adapter, that the run began with"
            )

    def describe(self) -> dict[str, Any]:
        return {"blocks": list(self.constraint.blocks)} if hasattr(self, "constraint") else {}

    def summary(self) -> str:
        directions, blocks, scope = self._directions, len(self.constraint.blocks), self._settings.scope
        along = f"directions of {', '.join(directions.concepts)}"
        if directions.of_refusal:
            apart = directions.gaps[list(self.constraint.blocks), 0].mean()
            along = f"the refusal direction (malicious and benign prompts lie {apart:.3g} apart)"
        source = f"recorded for {len(self.anchors):,} sequences in {self.anchors.path}" if self.anchors else "live"
        return f"{blocks} blocks' inputs along {along}, at {scope} tokens; anchors {source}; {self.fusion}"

    def _live_anchors(self, run: Run) -> LiveAnchors:
        with run.autocast():
            return LiveAnchors(
                run.model,
                self._directions,
                blocks=self.constraint.blocks,
                adapters_off=self._adapters_off,
                reference=run.reference,
            )

    def _folder(self, run: Run) -> Path:
        """Where each starting state has a folder of its own, so that a changed model never meets old anchors."""
        # Of the output folder, push_to_hub leaves out what begins with an underscore.
        return Path(self._settings.anchors_dir or run.folder / "_anchors")
