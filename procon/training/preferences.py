"""TRL's DPOTrainer, KTOTrainer and GRPOTrainer under the projection constraint.

They run a reference forward anyway, which gives the live anchors as well, at no further cost. Training tokens have
anchors only if the arguments say so: by default the probes alone are kept.
"""

from __future__ import annotations

from procon.errors import require_extra

__extra__ = require_extra("trl", __name__)

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer

from procon.anchors import LiveAnchors
from procon.errors import ProConError
from procon.method.tokens import TARGET
from procon.models import active_adapters, adapter_layer, find_decoder, unwrapped
from procon.training.config import ProConArguments
from procon.training.trainer import ProConMixin


class ReferenceMixin(ProConMixin):
    """Before a trainer of TRL that has a reference model, or switches adapters off to have one."""

    _has_reference = True

    if TYPE_CHECKING:
        ref_model: nn.Module | None

    def _refuse(self) -> None:
        super()._refuse()
        if getattr(self.args, "sync_ref_model", False) and self.procon.settings.anchors == "live":
            raise ProConError(
                "sync_ref_model moves the reference model as training goes on, so it gives no anchors: switch it off, "
                "or take procon_terms 'probes'"
            )

    def _is_reference(self, model: nn.Module) -> bool:
        """Whether a forward of ``model`` is now one of the starting model."""
        if model is getattr(self, "ref_model", None):
            return True
        layer = adapter_layer(find_decoder(unwrapped(model)))
        # TRL copies an adapter that is trained further, as it was at the start, to the name "ref".
        return layer is not None and active_adapters(layer) in ((), ("ref",))


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
        before = self.precompute_ref_logps
        try:
            return super().compute_loss(*args, **kwargs)
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


@dataclass
class ProConDPOConfig(ProConArguments, DPOConfig):
    """TRL's DPOConfig with the settings of the constraint."""


class ProConDPOTrainer(PairedReferenceMixin, DPOTrainer):
    """TRL's DPOTrainer with the constraint in its loss, and otherwise the DPOTrainer that it extends::

        trainer = ProConDPOTrainer("model", args=ProConDPOConfig(), train_dataset=pairs, peft_config=LoraConfig())

    Chosen and rejected sequences are constrained alike. ``args`` is a :class:`ProConDPOConfig`. The rest is said at
    :class:`procon.training.ProConMixin`.
    """

    _log_probabilities = ("ref_chosen_logps", "ref_rejected_logps")


@dataclass
class ProConKTOConfig(ProConArguments, KTOConfig):
    """TRL's KTOConfig with the settings of the constraint."""


class ProConKTOTrainer(PairedReferenceMixin, KTOTrainer):
    """TRL's KTOTrainer with the constraint in its loss, and otherwise the KTOTrainer that it extends.

    Desirable and undesirable sequences are constrained alike. ``args`` is a :class:`ProConKTOConfig`. The rest is said
    at :class:`procon.training.ProConMixin`.
    """

    _log_probabilities = ("ref_logps", "ref_KL_logps")


@dataclass
class ProConGRPOConfig(ProConArguments, GRPOConfig):
    """TRL's GRPOConfig with the settings of the constraint."""


class ProConGRPOTrainer(ReferenceMixin, GRPOTrainer):
    """TRL's GRPOTrainer with the constraint in its loss, and otherwise the GRPOTrainer that it extends.

    Live anchors hold prompts and completions to what they were under the starting model. With ``beta`` above 0 they
    come from the forward of the reference model that GRPO makes anyway; with ``beta`` 0 from one of their own, once for
    each completion. As with GRPO's own loss, an optimiser step is the mean over its micro-batches and ranks, here of
    each one's mean over its constrained tokens. ``args`` is a :class:`ProConGRPOConfig`. The rest is said at
    :class:`procon.training.ProConMixin`.

    Raises:
        ProConError: for recorded anchors, as tokens are generated while training.
    """

    #: Of the completions that were generated last, if the reference model has run on them.
    _of_reference: Tensor | None = None

    def _refuse(self) -> None:
        super()._refuse()
        if self.procon.tokens is not None and self.procon.settings.anchors == "recorded":
            raise ProConError(
                "GRPO generates the tokens that it trains on, so they cannot be recorded beforehand: take "
                "procon_anchors 'live', or procon_terms 'probes'"
            )

    def get_train_dataloader(self) -> DataLoader:
        # Prompts alone: what is constrained is generated from them.
        return GRPOTrainer.get_train_dataloader(self)

    def _prepare_inputs(self, inputs: Any) -> Any:
        return GRPOTrainer._prepare_inputs(self, inputs)

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        self._of_reference = None
        output = super()._generate_and_score_completions(inputs)
        live = self._live
        if live is None or not self.model.training:
            return output
        ids = torch.cat([output["prompt_ids"], output["completion_ids"]], 1)
        attention = torch.cat([output["prompt_mask"], output["completion_mask"]], 1)
        anchors, self._of_reference = self._of_reference, None
        if anchors is None:
            size = self.args.per_device_train_batch_size
            parts = zip(ids.split(size), attention.split(size), strict=True)
            with self.accelerator.autocast():
                anchors = torch.cat([live({"input_ids": i, "attention_mask": a}) for i, a in parts])
        return {**output, TARGET[0]: anchors, TARGET[1]: self._mask(output)}

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        # TRL trains on the same batch in each of num_iterations, and the anchors are taken out of what is handed on.
        return super().compute_loss(model, dict(inputs), *args, **kwargs)

    def _get_per_token_logps_and_entropies(self, model: nn.Module, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        run = super()._get_per_token_logps_and_entropies
        live = self._live
        if live is None or torch.is_grad_enabled() or not self._is_reference(model):
            return run(model, input_ids, *args, **kwargs)
        found, self._of_reference = live.of(lambda: run(model, input_ids, *args, **kwargs), len(input_ids))
        return found

    @property
    def _live(self) -> LiveAnchors | None:
        return None if self.procon.tokens is None else self.procon.tokens.live

    def _mask(self, output: dict[str, Tensor]) -> Tensor:
        """``[B, T]`` fp32: the constrained tokens of prompts and completions."""
        prompt, completion = output["prompt_mask"].float(), output["completion_mask"].float()
        if self.procon.settings.scope == "response":
            prompt = torch.zeros_like(prompt)
        elif self.procon.settings.scope == "prompt":
            completion = torch.zeros_like(completion)
        return torch.cat([prompt, completion], 1)

    def _count_constrained(self, batches: list[dict[str, Any]]) -> None:
        return None  # what an optimiser step constrains is not generated yet
