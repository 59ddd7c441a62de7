"""Null-space LoRA: the update cannot see what malicious prompts make of a layer's input (the projector of GuardSpace,
Zhang et al. 2026, arXiv 2510.14301, without its initialisation by SVD).

    M = mean over tokens of malicious prompts of  x x^T        U: its leading eigenvectors, of ``energy`` of its trace
    grad A <- grad A (I - U U^T)    before each optimiser step: what it would be of  B A (I - U U^T) x
    A <- A (I - U U^T)              before the first one and after each, as Adam's steps lead out again

for each layer with an adapter, x its input under the model before training. What is left of such inputs for the update
B A x is the share of them outside of U.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from itertools import takewhile
from typing import Any, cast

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers.trainer_utils import TrainOutput

from benchmarks.study.defences.lora import check_lora_alone, lora_factors, lora_layers
from benchmarks.study.defences.trainer import AfterStep, DefenceTrainer
from procon.errors import ProConError
from procon.models import evaluating
from procon.sequences import IGNORE_INDEX


class NullSpaceTrainer(DefenceTrainer):
    """Trains a LoRA adapter in the null space of malicious prompts; no step has more to compute but the projection.

    Args:
        alignment_dataset: tokenised as ``train_dataset`` is: malicious prompts with refusals. Of each row the tokens
            ahead of the reply count.
        energy: share of the inputs' second moment that the update does not see, between 0 and 1.

    Attributes:
        ranks: of each layer, how many of its input's directions that takes; by the layer's name.

    Raises:
        ProConError: if anything but a LoRA adapter trains, ``energy`` is no such share, or no row has a prompt.
    """

    def __init__(self, *args: Any, alignment_dataset: Dataset, energy: float = 0.9, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not 0 < energy < 1:
            raise ProConError(f"energy is {energy:g}: give a share between 0 and 1")
        check_lora_alone(self.model, "the null space is that of")
        self.alignment_dataset, self.energy = alignment_dataset, energy
        self._seen: list[tuple[nn.Parameter, Tensor]] = []
        self.ranks: dict[str, int] = {}
        self.add_callback(AfterStep(self.project))

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        self._seen.clear()
        for (name, layer), moment in zip(lora_layers(self.model), self._moments(), strict=True):
            directions = leading_directions(moment, self.energy)
            self.ranks[name] = directions.shape[1]
            self._seen.append((lora_factors(layer)[0], directions))
        self.project()
        return super().train(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:  # of the whole optimiser step, and of all ranks
            for a, directions in self._seen:
                if a.grad is not None:
                    _take_out(a.grad, directions)
        return loss

    @torch.no_grad()
    def project(self) -> None:
        """Take out of every A what reads the malicious prompts' directions."""
        for a, directions in self._seen:
            _take_out(a, directions)

    @torch.no_grad()
    def _moments(self) -> list[Tensor]:
        """``[in, in]`` fp64: of each layer with an adapter, the sum of ``x x^T`` over the tokens.

        On the CPU, where they take 134 MB for each layer of width 4096.
        """
        layers = [layer for _, layer in lora_layers(self.model)]
        moments: list[Any] = [0.0] * len(layers)

        def add(number: int, _: nn.Module, inputs: tuple[Any, ...]) -> None:
            x = inputs[0].flatten(0, -2).double()
            moments[number] = moments[number] + (x.T @ x).cpu()

        with ExitStack() as stack:
            stack.enter_context(evaluating(self.model))
            for number, layer in enumerate(layers):
                module = cast(nn.Module, layer)  # which PEFT does not declare it to be
                hook = module.register_forward_pre_hook(partial(add, number))
                stack.callback(hook.remove)
            for ids in prompts_of(self.alignment_dataset):  # one by one: padding is no token
                self.model(input_ids=torch.tensor([ids], device=self.args.device))
        return moments


def prompts_of(dataset: Dataset) -> list[list[int]]:
    """Of each row the tokens ahead of its reply, those of the chat template too; ProConError if no row has any."""
    prompts = [
        [token for token, _ in takewhile(lambda pair: pair[1] == IGNORE_INDEX, zip(ids, labels, strict=True))]
        for ids, labels in zip(dataset["input_ids"], dataset["labels"], strict=True)
    ]
    prompts = [ids for ids in prompts if ids]
    if not prompts:
        raise ProConError("no row of alignment_dataset has tokens ahead of its reply: give prompts with replies")
    return prompts


def _take_out(values: Tensor, directions: Tensor) -> None:
    """What the rows of ``values [r, in]`` have along ``directions [in, k]``, in place."""
    directions = directions.to(values.device)
    values -= ((values.float() @ directions) @ directions.T).to(values.dtype)


def leading_directions(moment: Tensor, energy: float) -> Tensor:
    """``[in, k]`` fp32: the fewest eigenvectors of a second moment ``[in, in]`` that hold ``energy`` of its trace."""
    values, vectors = torch.linalg.eigh(moment)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    held = values.cumsum(0) / values.sum()
    return vectors[:, : int((held < energy).sum()) + 1].float()
