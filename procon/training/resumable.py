"""A Trainer whose runs have a folder to themselves, and go on as the run that they go on from, or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

from torch import nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, rotate_checkpoints

from procon.chat import describe_chat
from procon.errors import ProConError
from procon.files import sync_files, writing
from procon.method.ranks import on_main
from procon.method.record import begin, write_record
from procon.models import is_sharded
from procon.training.best import BestMixin
from procon.training.checkpoints import Checkpoint, break_seal, delete_superseded, latest, open_checkpoint, seal
from procon.training.model_card import write_unconstrained
from procon.training.output import claim, locked, output_folder
from procon.training.run_facts import check_same_run, run_arguments, run_facts
from procon.version import __version__


class ResumableMixin(BestMixin):
    """Before any subclass of transformers' Trainer: its output folder, its checkpoints and how it goes on from one.

    - One training at a time writes to an output folder, and none over what another one left.
    - A checkpoint counts as whole once the files of every rank are on the disk, with their checksums in its
      ``procon.json``. If the latest one is damaged, a warning names the file, and the one before is taken.
    - A resumed run has the model, data, seed, batch size and settings of the one that it goes on from.
    """

    _run: dict[str, Any] | None = None

    def train(
        self, resume_from_checkpoint: str | Path | bool | Checkpoint | None = None, *args: Any, **kwargs: Any
    ) -> TrainOutput:
        """Train, or go on from a checkpoint: one that is given, or the latest whole one for True.

        Raises:
            ProConError: if another process trains in the output folder, another training has left a model there, or
                the checkpoint is damaged, or of another run.
        """
        folder = output_folder(self.args)
        with locked(folder):
            checkpoint = self._opened(resume_from_checkpoint)
            self._run = self._run_facts()
            if checkpoint:
                self._check_resumed(checkpoint)
                if self.args.should_save and not self.args.metric_for_best_model:
                    delete_superseded(checkpoint, self.args.save_total_limit)
            else:
                record, overwrite = self._record(), getattr(self.args, "procon_overwrite", False)
                on_main(lambda: claim(folder, record, overwrite=overwrite))
            with self._constraining(checkpoint):
                return super().train(str(checkpoint.path) if checkpoint else None, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model and, beside it, what it was trained under."""
        folder = Path(output_dir) if output_dir else output_folder(self.args)
        if self.args.should_save and self._run is not None:
            with writing(folder):
                begin(folder, self._record())
        with writing(folder):
            super().save_model(output_dir, _internal_call)
            if self.args.should_save:
                sync_files(folder)
        self._describe(folder)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        super().create_model_card(*args, **kwargs)
        self._describe(output_folder(self.args))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run_folder = Path(self._get_output_dir(trial=trial))
        folder = run_folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save and folder.exists():
            break_seal(folder)
            shutil.rmtree(folder)
        self.accelerator.wait_for_everyone()
        with self._keeping_older(), writing(folder):
            super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()  # until every rank has written its files
        if self.args.should_save:
            with writing(folder):
                seal(folder, {**self._record(), "resumable": not self.args.save_only_model})
            rotate_checkpoints(
                output_dir=str(run_folder),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )
        self.accelerator.wait_for_everyone()

    @contextmanager
    def _keeping_older(self) -> Iterator[None]:
        """The Trainer would delete older checkpoints before this one is known to be whole."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            yield
        finally:
            self.args.save_total_limit = limit

    @property
    def _constrains(self) -> bool:
        """Whether this training is one under the constraint."""
        return False

    def _constraining(self, checkpoint: Checkpoint | None) -> AbstractContextManager[Any]:
        """What holds while training; ``checkpoint`` is the one to go on from."""
        return nullcontext()

    def _run_facts(self) -> dict[str, Any]:
        """Of the main process: others may hold no weights worth the name yet; of sharded ones, all need the others."""
        model, reference = cast(nn.Module, self.model), getattr(self, "ref_model", None)
        # One that moves with the model, or lies on several ranks, has no weights to compare.
        if reference is not None and (getattr(self.args, "sync_ref_model", False) or is_sharded(reference)):
            reference = None

        def find() -> dict[str, Any]:
            return run_facts(
                self.args,
                model,
                self.train_dataset,
                precision=self.accelerator.mixed_precision,
                together=self.get_tp_size() * self.get_cp_size() * self.get_sp_size(),
                reads_data=self._constrains,
                reference=reference,
            )

        return on_main(find, all_call=is_sharded(model))

    def _run_arguments(self) -> dict[str, Any]:
        return run_arguments(
            self.args,
            cast(nn.Module, self.model),
            data_collator=self.data_collator,
            compute_loss_func=self.compute_loss_func,
        )

    def _record(self) -> dict[str, Any]:
        """What goes into ``procon.json``."""
        return {
            "version": __version__,
            "constrained": False,
            "schedule": "0",
            "chat": describe_chat(cast(Any, self.processing_class), getattr(self, "chat", None)),
            "run": self._run,
            "arguments": self._run_arguments(),
            **({"best": self.best} if self.best else {}),
        }

    def _describe(self, folder: Path) -> None:
        """Write beside the model what it was trained under, and into its card, if it has one."""
        if self._run is None or not self.args.should_save:
            return
        write_unconstrained(folder / "README.md")
        write_record(folder, self._record())

    def _opened(self, given: str | Path | bool | Checkpoint | None) -> Checkpoint | None:
        if isinstance(given, Checkpoint) or not given:
            return given or None
        if given is not True:
            path = Path(given)
            return on_main(lambda: open_checkpoint(path))
        folder = output_folder(self.args)
        found = on_main(lambda: latest(folder))
        if found is None:
            raise ProConError(f"no complete checkpoint in {str(folder)!r} to resume from: start afresh")
        return found

    def _check_resumed(self, checkpoint: Checkpoint) -> None:
        """Raise ProConError unless this run is the one that the checkpoint is of."""
        schedule = checkpoint.record.get("schedule", "0")
        if schedule != "0" and not self._constrains:
            raise ProConError(
                f"{checkpoint} is of training under the constraint (schedule {schedule!r}), which this run would not "
                "have: resume with the same procon_schedule, or start afresh"
            )
        check_same_run(checkpoint.record, self._run or {}, self._run_arguments(), str(checkpoint))
