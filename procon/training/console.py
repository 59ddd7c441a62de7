"""Which logged values the console shows: it has room for a few; trackers and files get all."""

from __future__ import annotations

from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback


def log_apart(trainer: Trainer, logs: dict[str, float]) -> None:
    """Log as transformers' Trainer does, and not as its subclasses do.

    Those add, and then collect from nothing, what belongs to the next row of the training itself: TRL's entropy and
    accuracy of tokens would stand in a row of drift, and be missing from that of the loss.
    """
    Trainer.log(trainer, logs)


def log_with_details(trainer: Trainer, logs: dict[str, float], details: dict[str, float]) -> None:
    """Log all in one entry, of which the console shows ``logs`` alone.

    The Trainer's console callbacks print every entry whole: one of 30 or 80 blocks would bury the loss under it.
    """
    handler = trainer.callback_handler
    everyone = handler.callbacks
    printers = [callback for callback in everyone if _prints(callback)]
    try:
        handler.callbacks = [callback for callback in everyone if callback not in printers]
        log_apart(trainer, {**logs, **details})
        # With what the Trainer has added to it, such as the epoch.
        entry = trainer.state.log_history[-1]
        handler.callbacks = printers
        shown = {name: value for name, value in entry.items() if name not in details and name != "step"}
        trainer.control = handler.on_log(trainer.args, trainer.state, trainer.control, shown)
    finally:
        handler.callbacks = everyone


def show_beside_bar(trainer: Trainer, text: str) -> None:
    """Put ``text`` behind the progress bar of training, if there is one: on the main process, with tqdm."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, ProgressCallback) and callback.training_bar is not None:
            callback.training_bar.set_postfix_str(text)


def leave_out_of_bar(trainer: Trainer, seconds: float) -> None:
    """Have the progress bar of training, if there is one, count the time and speed of steps without ``seconds``."""
    for callback in trainer.callback_handler.callbacks:
        bar = getattr(callback, "training_bar", None)
        if isinstance(callback, ProgressCallback) and bar is not None and hasattr(bar, "start_t"):
            bar.start_t += seconds
            bar.last_print_t += seconds


def _prints(callback: TrainerCallback) -> bool:
    # TRL's bars, by rich, are of another class, and go by the same name.
    return isinstance(callback, PrinterCallback) or hasattr(callback, "training_bar")
