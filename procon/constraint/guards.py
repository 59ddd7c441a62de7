"""What every trainer under the constraint refuses, as it would go on without it or with broken hidden states."""

from __future__ import annotations

import math

from procon.errors import ProConError


def refuse_data_parallel(n_gpu: int) -> None:
    """Raise ProConError if a Trainer would wrap the model in ``nn.DataParallel``: one process sees several GPUs."""
    if n_gpu > 1:
        raise ProConError("nn.DataParallel copies the model without its hooks: start one process per GPU with torchrun")


def refuse_noise(neftune_noise_alpha: float | None) -> None:
    """Raise ProConError if embeddings get noise in training, in the probes' forwards too: anchors are without."""
    if neftune_noise_alpha:
        raise ProConError(
            f"neftune_noise_alpha is {neftune_noise_alpha:g}, and noise on the embeddings moves every token further "
            "from its anchor than training does, so the constraint would act against the noise: leave it out"
        )


def check_finite(penalty: float, step: int) -> None:
    """Raise ProConError if the penalty up to optimiser step ``step`` says that hidden states went bad."""
    if not math.isfinite(penalty):
        raise ProConError(
            f"the penalty became {penalty} by step {step}, so hidden states are NaN or infinite: resume from the last "
            "checkpoint with a lower learning rate, or train in bfloat16 or float32"
        )
