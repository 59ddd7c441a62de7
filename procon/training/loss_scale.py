"""How a Trainer divides a loss after ``compute_loss``."""

from __future__ import annotations

from transformers import Trainer


def loss_scale(trainer: Trainer, num_items_in_batch: object | None) -> float:
    """The factor that undoes what the Trainer and the ranks' averaging divide a loss by after ``compute_loss``.

    A term that is a micro-batch's share of a mean over the whole optimiser step keeps its size when multiplied by it.
    ``num_items_in_batch`` is what ``compute_loss`` was given.
    """
    scale = trainer.accelerator.num_processes // trainer.get_tp_size()
    scaled = getattr(trainer, "loss_is_scaled_for_ga", None)
    if scaled is None:
        scaled = trainer.compute_loss_func is not None or (
            trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
        )
    return scale if scaled else scale * trainer.current_gradient_accumulation_steps
