"""Whether what a constraint comes to goes into a loss, in loops that nobody else watches."""

from __future__ import annotations

from torch import Tensor


class Use:
    """How a constraint was used while it was attached.

    Attributes:
        forwards: those with gradients that ran under a target.
        asked: how often the penalty was asked for.
        trained: whether the model ran in training mode with gradients, constrained or not.
    """

    def __init__(self) -> None:
        self.forwards = 0
        self.asked = 0
        self.trained = False
        self._arrived = 0

    def watch(self, penalty: Tensor) -> None:
        """Look out for the gradient of a penalty."""
        if penalty.requires_grad:
            penalty.register_hook(self._arrive)

    def count(self, penalty: Tensor) -> None:
        """Take a penalty on the same model, of a forward and a function of its own, for one of the constraint's."""
        self.forwards += 1
        self.asked += 1
        self.watch(penalty)

    def lost(self) -> str | None:
        """What to say if the model was trained and the constraint was not, None otherwise."""
        if self._arrived or not (self.forwards or self.trained):
            return None
        if not self.forwards:
            return (
                "the model was trained while the constraint was attached, and never under it: call set_target(anchors, "
                "mask) with enabled = True, or detach() to train without it"
            )
        if not self.asked:
            return (
                f"set_target was called for {self.forwards} forwards with gradients, and penalty() never, so nothing "
                "was constrained: add alpha * constraint.penalty() to the loss"
            )
        return (
            f"penalty() was called {self.asked} times, and none of them went through backward, so nothing was "
            "constrained: add alpha * constraint.penalty() to the loss; to measure alone, run under torch.no_grad()"
        )

    def _arrive(self, _gradient: Tensor) -> None:
        self._arrived += 1
