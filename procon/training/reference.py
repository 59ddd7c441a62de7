"""For trainers that run a reference forward anyway: it gives the live anchors as well, at no further cost."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from procon.anchors import LiveAnchors
from procon.errors import ProConError
from procon.models import active_adapters, adapter_layer, find_decoder, unwrapped
from procon.training.trainer import ProConMixin

if TYPE_CHECKING:
    from collections.abc import Iterator

#: The adapter that TRL makes of one that is trained further, as it was at the start.
_REFERENCE_ADAPTER = "ref"


class ReferenceMixin(ProConMixin):
    """Before a trainer of TRL that has a reference model, or switches adapters off to have one."""

    if TYPE_CHECKING:
        ref_model: nn.Module | None

    def _refuse(self) -> None:
        super()._refuse()
        if getattr(self.args, "sync_ref_model", False) and self.procon.settings.anchors == "live":
            raise ProConError(
                "sync_ref_model moves the reference model as training goes on, so it gives no anchors: switch it off, "
                "or take procon_anchors 'none' and its probes"
            )

    @property
    def _reference_model(self) -> nn.Module | None:
        reference = getattr(self, "ref_model", None)
        return None if reference is None else unwrapped(reference)

    def _is_reference(self, model: nn.Module) -> bool:
        """Whether a forward of ``model`` is now one of the starting model."""
        if model is getattr(self, "ref_model", None):
            return True
        layer = adapter_layer(find_decoder(unwrapped(model)))
        return layer is not None and active_adapters(layer) in ((), (_REFERENCE_ADAPTER,))


class PairedReferenceMixin(ReferenceMixin):
    """Before DPOTrainer or KTOTrainer, which compute the reference's log-probabilities in ``compute_loss``.

    They are computed first, and handed over as if they had been precomputed.
    """

    #: The batch's keys for them, in the order that ``compute_ref_log_probs`` gives them in.
    _log_probabilities: tuple[str, ...]

    if TYPE_CHECKING:
        precompute_ref_logps: bool

        def compute_ref_log_probs(self, model: nn.Module, inputs: dict[str, Any]) -> Any: ...

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        with self._restoring():
            return super().compute_loss(*args, **kwargs)

    @contextmanager
    def _restoring(self) -> Iterator[None]:
        before = self.precompute_ref_logps
        try:
            yield
        finally:
            self.precompute_ref_logps = before

    def _project_live(self, live: LiveAnchors, inputs: dict[str, Any]) -> Tensor:
        if self.precompute_ref_logps or getattr(self, "use_liger_kernel", False):
            return super()._project_live(live, inputs)
        model = self.ref_model if self.ref_model is not None else self.model
        found, anchors = live.of(lambda: self.compute_ref_log_probs(model, inputs), len(inputs["input_ids"]))
        inputs.update(
            {name: value for name, value in zip(self._log_probabilities, found, strict=True) if value is not None}
        )
        self.precompute_ref_logps = True
        return anchors
