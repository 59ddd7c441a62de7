"""Trainers that take turns: each trains as it always does, a few steps at a time, when it is called."""

from __future__ import annotations

from threading import Semaphore, Thread
from typing import Any

from transformers import Trainer, TrainerCallback


class Turns(TrainerCallback):
    """A training in a thread of its own, which waits between turns.

    Args:
        trainer: with more steps to train than are called for.
        steps: optimiser steps of a turn.
    """

    def __init__(self, trainer: Trainer, steps: int) -> None:
        self._steps, self._ending = steps, False
        self._called, self._done = Semaphore(0), Semaphore(0)
        self._failed: BaseException | None = None
        trainer.add_callback(self)
        self._thread = Thread(target=self._train, args=(trainer,), daemon=True)

    def __enter__(self) -> Turns:
        """Everything ahead of the first step is done then."""
        self._thread.start()
        self._wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending = True
        self._called.release()
        self._thread.join()

    def __call__(self) -> None:
        """Train for one turn."""
        self._called.release()
        self._wait()

    def _wait(self) -> None:
        self._done.acquire()
        if self._failed is not None:
            raise self._failed

    def _train(self, trainer: Trainer) -> None:
        try:
            trainer.train()
        except BaseException as error:
            self._failed = error
        self._done.release()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self._steps:
            return
        self._done.release()
        self._called.acquire()
        if self._ending:
            control.should_training_stop = True  # after one step more
