"""SafeLoRA: a LoRA update that leads away from alignment is projected back (Hsu et al. 2024, "Safe LoRA: The Silver
Lining of Reducing Safety Risks when Finetuning Large Language Models", arXiv 2405.16833, section 3).

    V = W_aligned - W_base        C = V V^T / ||V||_F        dW = B A
    where cos(dW, C dW) <= threshold:    B <- C B

for each layer with an adapter; the cosine is that of matrices as vectors (Frobenius). C is never made: with rank r, the
projection of B costs as much as one product of V with r vectors, there and back.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.trainer_utils import TrainOutput

from benchmarks.study.defences.trainer import DefenceTrainer
from procon.errors import ProConError
from procon.models import load_model


class SafeLoRATrainer(DefenceTrainer):
    """Trains a LoRA adapter and then projects it, at the end of :meth:`train`; checkpoints hold what is not projected.

    The aligned weights are those under the adapter.

    Args:
        base: the model before it was aligned, or its folder or hub name.
        threshold: cosine up to which an update is projected.

    Attributes:
        cosines: cosine of each layer before the projection, after :meth:`train`.

    Raises:
        ProConError: if anything but a LoRA adapter trains, or ``base`` is the aligned model itself.
    """

    def __init__(self, *args: Any, base: PreTrainedModel | str | Path, threshold: float = 0.35, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.threshold = threshold
        self.cosines: dict[str, float] = {}
        self._base = base
        trained = [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        if beside := [name for name in trained if ".lora_A." not in name and ".lora_B." not in name]:
            raise ProConError(f"SafeLoRA projects a LoRA adapter, but {beside[0]} trains: train LoRA alone")

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        output = super().train(*args, **kwargs)
        base = self._base
        if not isinstance(base, nn.Module):
            base = load_model(base, dtype=next(self.model.parameters()).dtype)[0]
        self.cosines = project_update(self.model, self.model, base, self.threshold)
        return output


@torch.no_grad()
def project_update(
    peft_model: nn.Module, aligned: nn.Module, base: nn.Module, threshold: float = 0.35
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
        ProConError: if the weights of base and aligned model are the same.
    """
    cosines = {}
    for name, layer in _lora_layers(peft_model):
        difference = _weight(aligned, name) - _weight(base, name)
        if not difference.any():
            raise ProConError(
                f"layer {name} is the same in the base and the aligned model, so there is no alignment to project on: "
                "give the model before it was aligned"
            )
        adapter = layer.active_adapters[0]
        a, b = (factors[adapter].get_parameter("weight") for factors in (layer.lora_A, layer.lora_B))
        projected = difference @ (difference.T @ b.float()) / difference.norm()
        cosines[name] = _cosine(a, b, projected)
        if cosines[name] <= threshold:
            b.copy_(projected)
    return cosines


def _lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    """Name, without PEFT's own part of it, and layer of each layer with an adapter."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield name.removeprefix("base_model.model."), module


def _cosine(a: Tensor, b: Tensor, projected: Tensor) -> float:
    """Cosine of ``B A`` and ``(C B) A``, through the r by r products of their factors."""
    a, b, projected = a.double(), b.double(), projected.double()
    gram = a @ a.T
    inner, before, after = (((x.T @ y) * gram).sum() for x, y in ((b, projected), (b, b), (projected, projected)))
    return (inner / (before * after).sqrt().clamp_min(torch.finfo(a.dtype).tiny)).item() if before > 0 else 1.0


def _weight(model: nn.Module, name: str) -> Tensor:
    """``[out, in]`` fp32 weight of a linear layer, that under an adapter if it has one."""
    layer = getattr(model, "get_base_model", lambda: model)().get_submodule(name)
    layer = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
    weight = layer.get_parameter("weight")
    return (weight.T if isinstance(layer, Conv1D) else weight).detach().float()
