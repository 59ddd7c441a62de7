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
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.trainer_utils import TrainOutput

from benchmarks.study.defences.lora import check_lora_alone, lora_factors, lora_layers, without_peft
from benchmarks.study.defences.trainer import DefenceTrainer
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
        check_lora_alone(self.model, "SafeLoRA projects")
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
    for name, update in measure_updates(peft_model, aligned, base):
        cosines[name] = update.cosine
        if update.cosine <= threshold:
            update.b.copy_(update.projected)
    count = sum(cosine <= threshold for cosine in cosines.values())
    logger.info("SafeLoRA projected %d of %d layers", count, len(cosines))
    return cosines


class Update(NamedTuple):
    """A layer's LoRA update ``B A``, and how it lies to the step of alignment.

    Attributes:
        a, b: the factors, ``[r, in]`` and ``[out, r]``, as they train.
        projected: ``C B``, ``[out, r]`` fp32.
        cosine: of ``B A`` and ``C B A``; 1 if there is no update.
    """

    a: nn.Parameter
    b: nn.Parameter
    projected: Tensor
    cosine: float


@torch.no_grad()
def measure_updates(peft_model: PeftModel, aligned: nn.Module, base: nn.Module) -> Iterator[tuple[str, Update]]:
    """Name and update of each layer with an adapter; arguments and errors are those of :func:`project_update`."""
    for name, layer, difference in _alignment(peft_model, aligned, base):
        a, b = lora_factors(layer)
        projected = difference @ (difference.T @ b.float()) / difference.norm()
        yield name, Update(a, b, projected, _cosine(a, b, projected))


def _cosine(a: Tensor, b: Tensor, projected: Tensor) -> float:
    """Cosine of ``B A`` and ``(C B) A``, through the r by r products of their factors."""
    a, b, projected = a.double(), b.double(), projected.double()
    gram = a @ a.T
    inner, before, after = (((x.T @ y) * gram).sum() for x, y in ((b, projected), (b, b), (projected, projected)))
    return (inner / (before * after).sqrt().clamp_min(torch.finfo(a.dtype).tiny)).item() if before > 0 else 1.0


def _alignment(peft_model: nn.Module, aligned: nn.Module, base: nn.Module) -> Iterator[tuple[str, LoraLayer, Tensor]]:
    """Name, layer and ``V [out, in]`` fp32 of each layer with an adapter."""
    for name, layer in lora_layers(peft_model):
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


def _weight(model: nn.Module, name: str) -> Tensor:
    """``[out, in]`` fp32 weight of a linear layer, that under an adapter if it has one."""
    try:
        layer = without_peft(model).get_submodule(name)
    except AttributeError:
        raise ProConError(f"the base has no layer {name}: give the model that the aligned one was made from") from None
    layer = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
    weight = layer.get_parameter("weight")
    if not weight.is_floating_point():
        raise ProConError(f"layer {name} is quantised: SafeLoRA needs weights in bfloat16, float16 or float32")
    return (weight.T if isinstance(layer, Conv1D) else weight).detach().float()
