"""SafeLoRA: a LoRA update that leads away from alignment is projected back (Hsu et al. 2024, "Safe LoRA: The Silver
Lining of Reducing Safety Risks when Finetuning Large Language Models", arXiv 2405.16833, section 3).

    V = W_aligned - W_base        C = V V^T / ||V||_F        dW = B A
    where cos(dW, C dW) <= threshold:    B <- C B

for each layer with an adapter; the cosine is that of matrices as vectors (Frobenius). C is never made: with rank r, the
projection of B costs as much as one product of V with r vectors, there and back.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.trainer_utils import TrainOutput

from procon.defences.trainer import DefenceTrainer
from procon.errors import ProConError
from procon.models import load_model

logger = logging.getLogger(__name__)


class SafeLoRATrainer(DefenceTrainer):
    """Trains a LoRA adapter and then projects it, at the end of :meth:`train`; checkpoints hold what is not projected.

    The aligned weights are those under the adapter.

    Args:
        base: the model before it was aligned, or its folder or hub name.
        threshold: cosine up to which an update is projected.

    Attributes:
        cosines: cosine of each layer before the projection, after :meth:`train`.

    Raises:
        ProConError: if anything but a LoRA adapter trains, or ``base`` does not fit or is the aligned model itself.
    """

    model: PeftModel  # pyright: ignore[reportIncompatibleVariableOverride]  # any other is refused

    def __init__(self, *args: Any, base: PreTrainedModel | str | Path, threshold: float = 0.35, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.threshold = threshold
        self.cosines: dict[str, float] = {}
        self._base = base
        beside = [
            name
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad and not any(part in name for part in (".lora_A.", ".lora_B."))
        ]
        if beside or not isinstance(self.model, PeftModel):
            what = beside[0] if beside else "no adapter"
            raise ProConError(f"SafeLoRA projects a LoRA adapter, but {what} trains: train LoRA alone")
        # Before the hours of training, and not after them.
        for _ in _alignment(self.model, self.model, self._load_base()):
            pass

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        output = super().train(*args, **kwargs)
        self.cosines = project_update(self.model, self.model, self._load_base(), self.threshold)
        return output

    def _load_base(self) -> PreTrainedModel:
        if isinstance(self._base, nn.Module):
            return self._base
        return load_model(self._base, dtype=next(self.model.parameters()).dtype)[0]


@torch.no_grad()
def project_update(
    peft_model: PeftModel, aligned: nn.Module, base: nn.Module, threshold: float = 0.35
) -> dict[str, float]:
    """Project the active LoRA adapter's update, in place, if it leads away from alignment.

    Args:
        peft_model: with one active LoRA adapter on linear layers.
        aligned: the aligned model; ``peft_model`` itself if that is what the adapter was trained on.
        base: the same model before alignment.
        threshold: layers with a cosine up to this are projected.

    Returns:
        The cosine of each layer before the projection, by the layer's name; 1 if there is no update.

    Raises:
        ProConError: for an adapter that is not LoRA on linear layers, and weights that do not fit or are the same.
    """
    cosines = {}
    for name, layer, difference in _alignment(peft_model, aligned, base):
        adapter = layer.active_adapters[0]
        a, b = (factors[adapter].get_parameter("weight") for factors in (layer.lora_A, layer.lora_B))
        projected = difference @ (difference.T @ b.float()) / difference.norm()
        cosines[name] = _cosine(a, b, projected)
        if cosines[name] <= threshold:
            b.copy_(projected)
    count = sum(cosine <= threshold for cosine in cosines.values())
    logger.info("SafeLoRA projected %d of %d layers", count, len(cosines))
    return cosines


def _cosine(a: Tensor, b: Tensor, projected: Tensor) -> float:
    """Cosine of ``B A`` and ``(C B) A``, through the r by r products of their factors."""
    a, b, projected = a.double(), b.double(), projected.double()
    gram = a @ a.T
    inner, before, after = (((x.T @ y) * gram).sum() for x, y in ((b, projected), (b, b), (projected, projected)))
    return (inner / (before * after).sqrt().clamp_min(torch.finfo(a.dtype).tiny)).item() if before > 0 else 1.0


def _alignment(peft_model: nn.Module, aligned: nn.Module, base: nn.Module) -> Iterator[tuple[str, LoraLayer, Tensor]]:
    """Name, layer and ``V [out, in]`` fp32 of each layer with an adapter."""
    layers = {n: m for n, m in _whole(peft_model).named_modules() if isinstance(m, BaseTunerLayer)}
    if not layers:
        raise ProConError(f"SafeLoRA projects a LoRA adapter, and {type(peft_model).__name__} has none: add one")
    for name, layer in layers.items():
        adapters = layer.active_adapters
        plain = isinstance(layer.get_base_layer(), (nn.Linear, Conv1D)) and len(adapters) == 1
        if not isinstance(layer, LoraLayer) or not plain or adapters[0] not in layer.lora_A or layer.lora_variant:
            raise ProConError(f"layer {name} has another adapter than one LoRA on a linear layer: train LoRA alone")
        ours, theirs = (_weight(model, name) for model in (aligned, base))
        if ours.shape != theirs.shape:
            raise ProConError(
                f"layer {name} has the shape {tuple(ours.shape)}, and {tuple(theirs.shape)} in the base: give the "
                "model that the aligned one was made from"
            )
        difference = ours - theirs.to(ours.device)
        if not difference.any():
            raise ProConError(
                f"layer {name} is the same in the base and the aligned model, so there is no alignment to project on: "
                "give the model before it was aligned"
            )
        yield name, layer, difference


def _whole(model: nn.Module) -> nn.Module:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _weight(model: nn.Module, name: str) -> Tensor:
    """``[out, in]`` fp32 weight of a linear layer, that under an adapter if it has one."""
    try:
        layer = _whole(model).get_submodule(name)
    except AttributeError:
        raise ProConError(f"the base has no layer {name}: give the model that the aligned one was made from") from None
    layer = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
    weight = layer.get_parameter("weight")
    if not weight.is_floating_point():
        raise ProConError(f"layer {name} is quantised: SafeLoRA needs weights in bfloat16, float16 or float32")
    return (weight.T if isinstance(layer, Conv1D) else weight).detach().float()
