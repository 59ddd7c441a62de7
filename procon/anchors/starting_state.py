"""Anchors of a training: one folder for each starting state, found again when the training is resumed.

A changed model, scope or direction thus never meets old anchors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from procon.anchors.store import Anchors, fingerprint
from procon.directions import Directions
from procon.errors import ProConError
from procon.settings import TokenScope


class StartingState:
    """Where a training keeps its anchors.

    Args:
        given: the folder that the user named, if any.
        output_dir: the training's own; ``_anchors`` in it is used if none was named.
    """

    def __init__(self, given: str | Path | None, output_dir: str | Path) -> None:
        # Of the output folder, push_to_hub leaves out what begins with an underscore.
        self.root = Path(given or Path(output_dir) / "_anchors")

    def record(
        self,
        model: nn.Module,
        dataloader: Iterable[Mapping[str, Tensor]],
        directions: Directions,
        *,
        blocks: Sequence[int],
        scope: TokenScope,
        precision: str | None,
        progress: bool,
    ) -> Anchors:
        """The anchors of ``model`` as it now is, recorded unless they are there; see :meth:`Anchors.record`.

        Args:
            precision: as of :func:`procon.anchors.store.fingerprint`.
        """
        state = fingerprint(model, directions, blocks, scope, precision)
        return Anchors.record(
            model,
            dataloader,
            directions,
            self.root / state,
            blocks=blocks,
            scope=scope,
            progress=progress,
            fingerprint=state,
        )

    def reopen(self, name: str) -> Anchors:
        """The anchors of the interrupted training: the model is no longer in the state that they were recorded in.

        Raises:
            ProConError: if they are missing, damaged, or others than the name says.
        """
        found = Anchors.reopen(self.root / name)
        if found.fingerprint != name:
            raise ProConError(
                f"anchors in {str(found.path)!r} have the fingerprint {found.fingerprint}: they were put there from "
                "another folder; put those of the interrupted run back, or start afresh"
            )
        return found


def check_resumed(
    found: Mapping[str, Any], expected: Mapping[str, Any], checkpoint: str, remedies: Mapping[str, str] | None = None
) -> None:
    """Raise ProConError unless the settings of an interrupted training are those of the one that goes on.

    Args:
        found: what the checkpoint keeps.
        expected: what this training has, of all settings that must be the same.
        checkpoint: what the message calls it.
        remedies: by setting, what to do in place of giving the same one.
    """
    for name, value in expected.items():
        if found.get(name) != value:
            remedy = (remedies or {}).get(name, "resume with the same settings")
            raise ProConError(
                f"{checkpoint} was trained with {name} {found.get(name)!r}, not {value!r}: {remedy}, or start afresh"
            )


def require_length(dataset: object, name: str) -> None:
    """Raise ProConError unless the training set can be run through before training starts."""
    if dataset is None or not hasattr(dataset, "__len__"):
        raise ProConError(
            f"recorded anchors need a {name} with a length: a streamed one cannot be recorded beforehand, so take "
            "procon_anchors 'live' or 'probes' in a ProConTrainer"
        )
