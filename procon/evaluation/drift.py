"""How far refusal has drifted: rotation of the directions, and shift along the ones found at the start."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from procon.chat import ContrastPrompts
from procon.directions import ContrastMeans, Directions
from procon.settings import ChatSettings


@dataclass(frozen=True)
class Drift:
    """Change of a model since its directions were extracted, block by block; NaN where a block has no direction.

    Block inputs alone are compared, as in the paper.

    Attributes:
        cosine: ``[L]``, signed cosine of the re-extracted to the first direction (paper section III-B): 1 is no drift.
        malicious_shift, benign_shift: ``[L]``, change of the mean projection on the **first** direction over the
            malicious and the benign prompts, in units of the first gap: -1 on the malicious side means that they now
            lie where benign ones lay. The cosine cannot see this shift, nor the shift a rotation.
    """

    cosine: Tensor
    malicious_shift: Tensor
    benign_shift: Tensor

    @property
    def mean_cosine(self) -> float:
        """Mean over the blocks that have a direction."""
        return float(torch.nanmean(self.cosine))

    @property
    def lowest(self) -> tuple[int, float]:
        """The block whose cosine is lowest, and that cosine."""
        block = int(self.cosine.nan_to_num(nan=torch.inf).argmin())
        return block, float(self.cosine[block])


def measure_drift(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    reference: Directions,
    prompts: ContrastPrompts,
    *,
    chat: ChatSettings | None = None,
    batch_size: int = 32,
    progress: bool = True,
) -> Drift:
    """Drift of ``model`` since ``reference``, which must come from the same ``prompts``, asked in the same way, on the
    starting model."""
    return compare_means(
        reference, ContrastMeans.measure(model, tokenizer, prompts, chat=chat, batch_size=batch_size, progress=progress)
    )


def compare_means(reference: Directions, means: ContrastMeans) -> Drift:
    """Drift from ``reference`` to ``means`` of the same prompts."""
    cosine = reference.cosine(Directions.from_means(means))

    def shift(mean: Tensor, at_start: Tensor) -> Tensor:
        z = (mean * reference.basis[:, 0].double()).sum(-1).float()
        return torch.where(reference.usable, (z - at_start[:, 0]) / reference.gaps[:, 0], torch.nan)

    return Drift(
        cosine=cosine,
        malicious_shift=shift(means.malicious, reference.positive),
        benign_shift=shift(means.benign, reference.negative),
    )
