"""What every trainer under the constraint refuses, as it would go on without it or with broken hidden states."""

from __future__ import annotations

import math

from procon.errors import ProConError


def refuse_data_parallel(n_gpu: int) -> None:
    """Raise ProConError if a Trainer would wrap the model in ``nn.DataParallel``: one process sees several GPUs."""
    if n_gpu > 1:
        raise ProConError("nn.DataParallel copies the model without its hooks: start one process per GPU with torchrun")


def check_finite(penalty: float, step: int) -> None:
    """Raise ProConError if the penalty up to optimiser step ``step`` says that hidden states went bad."""
    if not math.isfinite(penalty):
        raise ProConError(
            f"the penalty became {penalty} by step {step}, so hidden states are NaN or infinite: resume from the last "
            "checkpoint with a lower learning rate, or train in bfloat16 or float32"
        )
